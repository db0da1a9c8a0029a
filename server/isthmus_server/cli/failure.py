"""How a command fails: one clear line, and the whole story with ``--log-level debug``."""

from __future__ import annotations

import logging
import sys
import traceback

EXIT_FAILURE = 1


def report(error: Exception) -> int:
    """Writes ``error`` to stderr; the exit status.  Anything that is not deliberate keeps its traceback."""
    from isthmus.errors import IsthmusError

    deliberate = isinstance(error, IsthmusError)
    if not deliberate or logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    else:
        line = " ".join(str(error).split())
        sys.stderr.write(f"isthmus: {line}\n")
    return EXIT_FAILURE
