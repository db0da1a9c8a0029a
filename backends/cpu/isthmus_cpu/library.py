"""The compiled kernels as Python sees them: records of operations, and a pool of threads that runs them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final

from isthmus.errors import BackendUnavailable

MAX_POINTERS: Final = 12
MAX_INTEGERS: Final = 12
MAX_FLOATS: Final = 4


class Kind(IntEnum):
    """As ``Kind`` in op.h."""

    EMBED = 0
    RMS_NORM = 1
    ADD_RMS_NORM = 2
    ADD = 3
    GATED = 4
    TAKE_ROWS = 5
    LINEAR = 6
    ROTATE_STORE = 7
    PLAN_ATTENTION = 8
    ATTEND = 9
    EXPERTS = 10
    SOFTCAP = 11
    ARGMAX = 12
    READ = 13
    DRAW = 14
    LOGPROBS = 15


class Rows(IntEnum):
    """As ``Rows`` in op.h: where an operation's number of rows comes from."""

    FIXED = 0
    TOKENS = 1
    SPANS = 2
    SAMPLES = 3


class Epilogue(IntEnum):
    """As ``Epilogue`` in gemm.h."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    ADD = 3


class Op(ctypes.Structure):
    """As ``Op`` in op.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("fixed", ctypes.c_int64),
        ("p", ctypes.c_void_p * MAX_POINTERS),
        ("i", ctypes.c_int64 * MAX_INTEGERS),
        ("f", ctypes.c_float * MAX_FLOATS),
    )


class Counts(ctypes.Structure):
    """As ``Counts`` in op.h."""

    _fields_ = (("tokens", ctypes.c_int64), ("spans", ctypes.c_int64), ("samples", ctypes.c_int64))


class Library:
    """The shared library.  Calls release the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`BackendUnavailable` if it cannot be loaded."""
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendUnavailable(
                f"the compiled kernels do not load: {error}; delete {path} to build them again"
            ) from error
        loaded.isthmus_pool_open.restype = ctypes.c_void_p
        loaded.isthmus_pool_open.argtypes = (ctypes.c_int,)
        loaded.isthmus_pool_close.argtypes = (ctypes.c_void_p,)
        loaded.isthmus_pool_close.restype = None
        loaded.isthmus_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
        loaded.isthmus_run.restype = None
        loaded.isthmus_packed_bytes.restype = ctypes.c_int64
        loaded.isthmus_packed_bytes.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
        loaded.isthmus_pack.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int),
            *(ctypes.c_int64, ctypes.c_int64),
        )
        loaded.isthmus_pack.restype = None
        loaded.isthmus_prepare.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 3),
            *(ctypes.c_int64, *(ctypes.c_void_p,) * 4),
        )
        loaded.isthmus_prepare.restype = None
        loaded.isthmus_read_tokens.argtypes = (ctypes.c_void_p,)
        loaded.isthmus_read_tokens.restype = None
        loaded.isthmus_write_tokens.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        loaded.isthmus_write_tokens.restype = None
        loaded.isthmus_instructions.restype = ctypes.c_char_p
        assert loaded.isthmus_op_bytes() == ctypes.sizeof(Op), "library.py and op.h disagree"
        self.calls = loaded
        self.instructions: str = loaded.isthmus_instructions().decode()
        self.panel = int(loaded.isthmus_panel())
        """Output columns of a packed panel."""
        self.value_padding = int(loaded.isthmus_value_padding())
        """What the head dimension of cached values is rounded up to."""


class Pool:
    """Threads that run operations in order, each operation over all of them.  One caller at a time."""

    def __init__(self, library: Library, threads: int) -> None:
        self.threads = threads
        self._calls = library.calls
        self._handle = self._calls.isthmus_pool_open(threads)
        self._no_counts = Counts()

    def run(
        self, ops: ctypes.Array[Op] | Op, length: int = 1, counts: Counts | None = None, *, alone: bool = False
    ) -> None:
        """``counts`` is read at the start; operations whose rows are FIXED need none.

        ``alone`` runs on the calling thread: for work that is over before another thread would wake.
        """
        assert self._handle is not None, "the pool is closed"
        step = self._no_counts if counts is None else counts
        self._calls.isthmus_run(self._handle, ctypes.byref(ops), length, ctypes.byref(step), alone)

    def close(self) -> None:
        if self._handle is not None:
            self._calls.isthmus_pool_close(self._handle)
            self._handle = None


def make_op(
    kind: Kind,
    rows: int,
    pointers: Sequence[int],
    integers: Sequence[int],
    floats: Sequence[float] = (),
    rows_from: Rows = Rows.FIXED,
) -> Op:
    op = Op(kind=kind, rows=rows_from, fixed=rows)
    op.p[: len(pointers)] = pointers
    op.i[: len(integers)] = integers
    op.f[: len(floats)] = floats
    return op
