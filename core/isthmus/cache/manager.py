"""Which blocks each row has: block tables over a pool, with the prefix cache behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from isthmus.cache.pool import BlockPool
from isthmus.cache.prefix import PrefixCache
from isthmus.plan import EMPTY, Int32Array


class TableEdits(NamedTuple):
    """Places in block tables that changed, for :class:`isthmus.plan.StepPlan`."""

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
        self._edits: dict[int, list[tuple[int, int]]] = {}  # by row: (index, block) the device does not know yet

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
        """Give each row ``missing`` more blocks; at most :attr:`num_available` in all.

        The edits also bring whatever else changed in these rows' tables.
        """
        edits = TableEdits()
        total = int(missing.sum())
        if total:
            short = total - self.pool.num_free
            if short > 0:
                self.cache.evict(short)
            ids = self.pool.take(total)
            owners = np.repeat(rows, missing)
            within = np.arange(total, dtype=np.int32) - np.repeat(np.cumsum(missing, dtype=np.int32) - missing, missing)
            indices = self.counts[owners] + within
            self.tables[owners, indices] = ids
            self.counts[rows] += missing
            edits = TableEdits(owners, indices, ids)
        return self._with_pending(edits, rows) if self._edits else edits

    def adopt(self, row: int, keys: Sequence[bytes]) -> None:
        """Begin an empty row's table with the cached blocks of ``keys``."""
        assert self.counts[row] == 0, f"row {row} still has blocks"
        if keys:
            ids = self.cache.hold(keys)
            self.tables[row, : len(ids)] = ids
            self.counts[row] = len(ids)
            self._edits[row] = list(enumerate(ids.tolist()))

    def share(self, row: int, keys: Sequence[bytes], begin: int, step: int) -> bool:
        """Put a row's full blocks from number ``begin`` on into the prefix cache, one for each key.

        Where another row's block of the same content is there already, this row takes that one and
        lets go of its own.  ``step`` is the last step planned.  Returns False if the chain is broken
        (a block before was forgotten), so that nothing after it can be shared.
        """
        table = self.tables[row]
        for index in range(begin, len(keys)):
            block, found = int(table[index]), self.cache.find(keys[index])
            if found is not None:
                if found != block:
                    self._replace(row, index, keys[index])
                continue
            parent = int(table[index - 1]) if index else 0
            if index and self.cache.find(keys[index - 1]) != parent:
                return False
            self.cache.insert(keys[index], parent, block, step)
        return True

    def release(self, row: int) -> None:
        """Let go of all blocks of a row."""
        held = self.tables[row, : self.counts[row]]
        self._let_go(held)
        held[:] = 0
        self.counts[row] = 0
        self._edits.pop(row, None)

    def _replace(self, row: int, index: int, key: bytes) -> None:
        mine = self.tables[row, index : index + 1].copy()
        (shared,) = self.cache.hold([key]).tolist()
        self._let_go(mine)
        self.tables[row, index] = shared
        self._edits.setdefault(row, []).append((index, shared))

    def _let_go(self, ids: Int32Array) -> None:
        self.pool.refs[ids] -= 1
        unheld = ids[self.pool.refs[ids] == 0]
        cached = self.cache.is_cached(unheld)
        self.cache.rest(unheld[cached])
        self.pool.put_back(unheld[~cached])

    def _with_pending(self, edits: TableEdits, rows: Int32Array) -> TableEdits:
        # An edit waits for its row's next span: only then does the device read that table, and only
        # then does a step that fails take down the row whose edit it lost.
        pending = [(row, *edit) for row in rows.tolist() for edit in self._edits.pop(row, ())]
        if not pending:
            return edits
        columns = np.array(pending, np.int32).T
        return TableEdits(*(np.concatenate(pair) for pair in zip(columns, edits, strict=True)))
