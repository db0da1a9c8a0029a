"""Which blocks are free, and how many rows hold each of the others."""

from __future__ import annotations

import numpy as np

from isthmus.plan import Int32Array


class BlockPool:
    """Ref-counted block ids ``1 ... num_blocks - 1``; block 0 is the spare one and is never handed out."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none to hand out beside the spare one"
        self.num_blocks = num_blocks
        self.refs = np.zeros(num_blocks, np.int32)
        """How many rows hold each block."""
        self._free = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)  # a stack: its top is at _num_free - 1
        self._num_free = num_blocks - 1

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def free_ids(self) -> Int32Array:
        return self._free[: self._num_free]

    def take(self, count: int) -> Int32Array:
        """``count`` free blocks, each held once.  The caller made sure that there are so many."""
        assert 0 <= count <= self._num_free, f"{count} blocks wanted, {self._num_free} free"
        self._num_free -= count
        ids = self._free[self._num_free : self._num_free + count][::-1].copy()
        self.refs[ids] = 1
        return ids

    def put_back(self, ids: Int32Array) -> None:
        """Make blocks that nobody holds free again."""
        assert not self.refs[ids].any(), "a block that is still held cannot be free"
        end = self._num_free + len(ids)
        assert end < self.num_blocks, "a block was put back twice"
        self._free[self._num_free : end] = ids
        self._num_free = end
