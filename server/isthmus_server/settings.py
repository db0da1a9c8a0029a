"""What the server is told at its start.  Parsed once by the command line, then frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from isthmus.config import EngineOptions

MAX_BODY_BYTES: Final = 32 * 2**20
MAX_BUFFERED_BYTES: Final = 2**30
"""Of all bodies together: what a flood of large requests may take."""
MAX_HEADER_BYTES: Final = 64 * 2**10
MAX_HEADERS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """``engine`` goes to the engine process; the rest stays here."""

    engine: EngineOptions
    served_names: tuple[str, ...] = ()
    """Names that clients may use for the model; the first is the one answers carry.  Empty: the path as given."""
    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    """A Unix socket to listen on instead of ``host`` and ``port``."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that open the API; none leaves it open to whoever reaches the socket."""
    chat_template: str | None = None
    """The text of a template that replaces the model's own."""
    drain_grace_s: float = 0.0
    """Seconds after SIGTERM in which new requests are still taken, while /readyz already says no."""
    shutdown_timeout_s: float = 30.0
    """Seconds that running requests are given to finish before they are cut."""
    stuck_after_s: float = 60.0
    """Seconds without progress, while there is work, after which /livez fails."""
    dead_linger_s: float = 2.0
    """Seconds that the server answers (with errors) after the engine's death, before it exits."""
    log_level: str = "info"
    access_log: bool = False
    """Log a line of JSON for each request at its end: counts and times, no content."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.served_names or (self.engine.model.model,)
