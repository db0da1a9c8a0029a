"""The ``isthmus`` command.  Each subcommand imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import sys

from isthmus_server.cli.app import app
from isthmus_server.cli.failure import report


def main() -> None:
    """Exits non-zero with one line on stderr for anything the user can put right."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(report(error))


__all__ = ["app", "main"]
