"""The prefix cache: full blocks of tokens, found again by what is in them and before them.

A radix tree whose nodes are blocks.  A node's key is SHA-256 over its parent's key and its own
tokens, so one key names a whole prefix, and a dictionary from keys to blocks is the tree's index.
The root key is made of a random seed of this process and the request's salt: nobody can aim for
another tenant's key, and requests of different salts never meet.

Two facts carry the algorithms here:

- A cached block's ancestors are cached too, since only leaves are evicted.  The part of a prompt
  that is cached is therefore found by bisection.
- Whoever holds a block holds its ancestors.  A block that nobody holds therefore has no held
  descendants, and every idle block can be evicted, leaves first.
"""

from __future__ import annotations

import heapq
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from isthmus.cache.pool import BlockPool
from isthmus.plan import Int32Array


class PrefixCache:
    """Finds, keeps and evicts full blocks.  Blocks held by nobody rest here until evicted."""

    def __init__(self, pool: BlockPool, block_size: int, seed: bytes | None = None) -> None:
        self._pool = pool
        self._block_size = block_size
        self._seed = secrets.token_bytes(32) if seed is None else seed
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes] = [b""] * pool.num_blocks
        self._cached = np.zeros(pool.num_blocks, np.bool_)
        self._parent = [0] * pool.num_blocks  # 0 for a first block: the spare block is no parent
        self._planned = [0] * pool.num_blocks  # last step planned when the block was inserted
        self._children = np.zeros(pool.num_blocks, np.int32)
        self._rested = np.zeros(pool.num_blocks, np.int64)  # when its last holder let go
        self._clock = 0
        self._leaves: list[tuple[int, int]] = []  # heap of (rested, block); entries may be out of date
        self.num_idle = 0
        """Cached blocks that nobody holds: all of them can be evicted."""

    def __len__(self) -> int:
        return len(self._block_of)

    def extend_keys(self, keys: list[bytes], tokens: Int32Array, salt: bytes) -> None:
        """Append to ``keys`` those of all full blocks of ``tokens`` that it lacks."""
        size = self._block_size
        key = keys[-1] if keys else sha256(self._seed + salt).digest()
        packed = tokens[len(keys) * size : len(tokens) // size * size].tobytes()
        stride = size * tokens.itemsize
        for begin in range(0, len(packed), stride):
            key = sha256(key + packed[begin : begin + stride]).digest()
            keys.append(key)

    def find(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def holds(self, block: int, key: bytes) -> bool:
        """Whether ``block`` is the one that ``key`` finds."""
        return self._key_of[block] == key

    def match(self, keys: Sequence[bytes], limit: int) -> int:
        """How many of the first ``limit`` keys are cached, counted from the first without a gap."""
        index = self._block_of
        return bisect_left(range(min(limit, len(keys))), True, key=lambda i: keys[i] not in index)

    def count_idle(self, keys: Sequence[bytes], count: int) -> int:
        """How many of the first ``count`` keys, all cached, name blocks that nobody holds."""
        index, refs = self._block_of, self._pool.refs
        return count - bisect_left(range(count), True, key=lambda i: bool(refs[index[keys[i]]] == 0))

    def hold(self, keys: Sequence[bytes]) -> Int32Array:
        """Hold the blocks of ``keys``, all cached, so that they are not evicted; their ids."""
        index = self._block_of
        ids = np.fromiter((index[key] for key in keys), np.int32, len(keys))
        self.num_idle -= int(np.count_nonzero(self._pool.refs[ids] == 0))
        self._pool.refs[ids] += 1
        return ids

    def is_cached(self, ids: Int32Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return self._cached[ids]

    def insert(self, key: bytes, parent: int, block: int, step: int) -> None:
        """Add a held block below ``parent`` (cached and held too; 0 for a prompt's first block).

        ``step`` is the last step planned so far: it, or one before it, computes the block.
        """
        assert key not in self._block_of and not self._key_of[block], f"block {block} is cached already"
        assert parent == 0 or self._key_of[parent], f"block {parent} has no place in the tree to put another below"
        self._block_of[key] = block
        self._key_of[block] = key
        self._cached[block] = True
        self._parent[block] = parent
        self._children[parent] += 1
        self._planned[block] = step

    def rest(self, ids: Int32Array) -> None:
        """Cached blocks whose last holder let go just now."""
        self.num_idle += len(ids)
        self._clock += 1
        self._rested[ids] = self._clock
        for block in ids[self._children[ids] == 0].tolist():
            heapq.heappush(self._leaves, (self._clock, block))
        if len(self._leaves) > 2 * self._pool.num_blocks:
            self._rebuild_leaves()

    def evict(self, count: int) -> None:
        """Give ``count`` idle blocks back to the pool, the longest idle leaf first."""
        assert count <= self.num_idle, f"{count} blocks to evict, {self.num_idle} idle"
        evicted: list[int] = []
        while len(evicted) < count:
            rested, block = heapq.heappop(self._leaves)
            if self._is_idle_leaf(block) and self._rested[block] == rested:
                self._remove(block)
                evicted.append(block)
        self.num_idle -= count
        self._pool.put_back(np.array(evicted, np.int32))

    def forget(self, ids: Int32Array) -> None:
        """Never find these blocks again, nor any that follow them.  Held ones stay with their holders."""
        doomed = np.zeros(self._pool.num_blocks, np.bool_)
        doomed[ids] = self._cached[ids]
        parents = np.array(self._parent)
        while (more := self._cached & doomed[parents] & ~doomed).any():
            doomed |= more
        gone = np.flatnonzero(doomed).astype(np.int32)
        for block in gone.tolist():
            self._remove(block)
        idle = gone[self._pool.refs[gone] == 0]
        self.num_idle -= len(idle)
        self._pool.put_back(idle)

    def forget_since(self, step: int) -> None:
        """Forget every block that ``step`` or a later one may have computed."""
        self.forget(np.flatnonzero(self._cached & (np.array(self._planned) >= step)).astype(np.int32))

    def _is_idle_leaf(self, block: int) -> bool:
        return bool(self._cached[block] and self._pool.refs[block] == 0 and self._children[block] == 0)

    def _remove(self, block: int) -> None:
        del self._block_of[self._key_of[block]]
        self._key_of[block] = b""
        self._cached[block] = False
        parent = self._parent[block]
        self._children[parent] -= 1
        if self._is_idle_leaf(parent):
            heapq.heappush(self._leaves, (int(self._rested[parent]), parent))

    def _rebuild_leaves(self) -> None:
        leaves = np.flatnonzero(self._cached & (self._pool.refs == 0) & (self._children == 0))
        self._leaves = list(zip(self._rested[leaves].tolist(), leaves.tolist(), strict=True))
        heapq.heapify(self._leaves)
