"""Memory in large pages where the system grants them: streamed weights then miss no address translation."""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

import torch
from torch import Tensor

SLAB_BYTES: Final = 64 << 20
ALIGNMENT: Final = 64


def large_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes], zeroed; resident only where it is touched.  Raises :class:`MemoryError`."""
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:  # Windows
            memory = mmap.mmap(-1, max(nbytes, 1))
    except OSError as error:
        raise MemoryError(f"{nbytes / 2**20:.0f} MiB could not be mapped: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


class Slabs:
    """Pieces of large maps, given back when the last piece of a map is dropped."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], aligned for any vector."""
        if nbytes > SLAB_BYTES // 4:
            return large_pages(nbytes)
        if self._used + nbytes > self._slab.numel():
            self._slab, self._used = large_pages(SLAB_BYTES), 0
        piece = self._slab[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece
