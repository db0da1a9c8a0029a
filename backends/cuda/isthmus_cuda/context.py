"""What is begun while torch is imported, since neither waits for the other: the device's context, and what the
compiler must know of itself."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Final

from isthmus_triton.identity import identify_compiler

DRIVER: Final = "libcuda.so.1"


def begin_context(index: int) -> threading.Thread:
    """Retain the primary context of device ``index``, the one that torch will use, on a thread of its own.

    Whatever is wrong is left to torch, which finds it again and says more.  The context is kept for
    the life of the process.
    """
    # torch asks for this too, but after a context is there it is too late.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=_retain, args=(index,), name="isthmus-context", daemon=True)
    thread.start()
    return thread


def begin_identifying() -> threading.Thread:
    """:func:`isthmus_triton.identity.identify_compiler` on a thread of its own."""
    thread = threading.Thread(target=identify_compiler, name="isthmus-identify", daemon=True)
    thread.start()
    return thread


def _retain(index: int) -> None:
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return
    # Calls through ctypes let the interpreter go on.
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
