"""What Triton finds out about itself before its first compilation.  Imports neither torch nor, until asked, Triton."""

from __future__ import annotations

import threading
from typing import Final

_lock: Final = threading.Lock()


def identify_compiler() -> None:
    """Have Triton hash its own sources and library, once a process, for the keys of its cache on disk.

    That takes a processor half a second, and threads that begin to compile together would each do it.
    """
    with _lock:
        try:
            from triton.runtime.cache import triton_key
        except ImportError:  # a Triton that does it elsewhere, and in its own time
            return
        triton_key()
