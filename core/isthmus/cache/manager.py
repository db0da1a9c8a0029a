"""Which blocks each row has: block tables over a pool, with the prefix cache behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from isthmus.cache.pool import BlockPool
from isthmus.cache.prefix import PrefixCache
from isthmus.plan import EMPTY, Int32Array


class TableEdits(NamedTuple):
    """Places in block tables that were filled, for :class:`isthmus.plan.StepPlan`."""

    rows: Int32Array = EMPTY
    indices: Int32Array = EMPTY
    ids: Int32Array = EMPTY


class BlockManager:
    """Block tables by row, ref-counted blocks, and what of them is shared.

    Steps run on the device in the order in which they were planned.  So a block let go now may be
    given to another row at once: what a step in flight still writes into it is written before
    anything that a later step writes or reads there.  In the same way a block may be found in the
    prefix cache as soon as the step that computes it has been planned.

    ``num_blocks`` includes the spare block 0.  ``seed`` makes prefix keys repeatable, for tests.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, seed: bytes | None = None
    ) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size, seed)
        self.tables = np.zeros((0, 0), np.int32)  # [rows, blocks a row], 0 where unset
        self.counts = np.zeros(0, np.int32)  # [rows] blocks in each row's table

    def open_rows(self, num_rows: int, max_tokens: int) -> None:
        """Make room for the tables of ``num_rows`` rows of up to ``max_tokens`` tokens; called once."""
        self.tables = np.zeros((num_rows, self.blocks_for(max_tokens)), np.int32)
        self.counts = np.zeros(num_rows, np.int32)

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out: all but the spare one."""
        return self.pool.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now, evicting from the prefix cache where needed."""
        return self.pool.num_free + self.cache.num_idle

    @property
    def num_used(self) -> int:
        """Blocks that rows hold; a shared one counts once."""
        return self.num_usable - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, rows: Int32Array, lengths: Int32Array) -> Int32Array:
        """How many blocks each row lacks to hold ``lengths`` tokens."""
        lacking: Int32Array = (lengths + (self.block_size - 1)) // self.block_size - self.counts[rows]
        return lacking

    def grow(self, rows: Int32Array, missing: Int32Array) -> TableEdits:
        """Give each row ``missing`` more blocks; at most :attr:`num_available` in all."""
        total = int(missing.sum())
        if not total:
            return TableEdits()
        short = total - self.pool.num_free
        if short > 0:
            self.cache.evict(short)
        ids = self.pool.take(total)
        owners = np.repeat(rows, missing)
        within = np.arange(total, dtype=np.int32) - np.repeat(np.cumsum(missing, dtype=np.int32) - missing, missing)
        indices = self.counts[owners] + within
        self.tables[owners, indices] = ids
        self.counts[rows] += missing
        return TableEdits(owners, indices, ids)

    def adopt(self, row: int, keys: Sequence[bytes]) -> TableEdits:
        """Begin an empty row's table with the cached blocks of ``keys``."""
        assert self.counts[row] == 0, f"row {row} still has blocks"
        ids = self.cache.hold(keys)
        self.tables[row, : len(ids)] = ids
        self.counts[row] = len(ids)
        return TableEdits(np.full(len(ids), row, np.int32), np.arange(len(ids), dtype=np.int32), ids)

    def share(self, row: int, keys: Sequence[bytes], begin: int, end: int, step: int) -> bool:
        """Put a row's full blocks ``begin ... end - 1``, of these keys, into the prefix cache.

        ``step`` is the last step planned.  Returns False if the row can share nothing further: a
        block before these was forgotten, or another row's block of the same content is there.  Blocks
        below that one would have a parent that this row does not hold.
        """
        first = max(begin - 1, 0)
        blocks = self.tables[row, first:end].tolist()
        parent = blocks.pop(0) if begin else 0
        if begin and not self.cache.holds(parent, keys[begin - 1]):
            return False
        for key, block in zip(keys[begin:end], blocks, strict=True):
            if self.cache.find(key) is not None:
                return False
            self.cache.insert(key, parent, block, step)
            parent = block
        return True

    def release(self, row: int) -> None:
        """Let go of all blocks of a row."""
        held = self.tables[row, : self.counts[row]]
        self.pool.refs[held] -= 1
        unheld = held[self.pool.refs[held] == 0]
        cached = self.cache.is_cached(unheld)
        self.cache.rest(unheld[cached])
        self.pool.put_back(unheld[~cached])
        held[:] = 0
        self.counts[row] = 0
