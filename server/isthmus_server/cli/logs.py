"""Logging of a command, to stderr."""

from __future__ import annotations

import logging
from enum import StrEnum


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def start_logging(level: LogLevel, part: str) -> None:
    """``part`` says which process a line is from; the engine process has its own lines."""
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s %(levelname)s {part} %(name)s: %(message)s", force=True
    )
    # Its lines tell of sockets and workers; what a user needs to know is told by ours.
    quiet = logging.DEBUG if level is LogLevel.DEBUG else logging.WARNING
    for name in ("uvicorn", "uvicorn.error", "asyncio", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(quiet)
