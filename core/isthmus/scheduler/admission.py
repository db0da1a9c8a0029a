"""Whether a waiting request may start now."""

from __future__ import annotations

import numpy as np

from isthmus.cache import BlockManager
from isthmus.plan import Int32Array
from isthmus.scheduler.forecast import OutputForecast, peak_tokens
from isthmus.scheduler.rows import Rows
from isthmus.scheduler.sequence import Sequence


class Admission:
    """Answers for one step: made when something could start, with the rows that run already."""

    def __init__(self, running: Int32Array, rows: Rows, blocks: BlockManager, forecast: OutputForecast) -> None:
        self._rows = rows
        self._blocks = blocks
        self._forecast = forecast
        lengths, size = rows.lengths[running], blocks.block_size
        private = lengths + (size - 1) - rows.cached[running]  # the last block will be partly empty
        generated, room = lengths - rows.num_prompt_tokens[running], rows.max_lengths[running] - lengths
        self._held = private.astype(np.float64)
        self._remaining = forecast.remaining(generated, room)
        # Blocks held by several rows count once, whoever of them stays: outside the peak of private ones.
        in_tables = int((blocks.counts[running] * size - rows.cached[running]).sum())
        self._shared = max(0, blocks.num_used * size - in_tables)
        self._next_keys = self._keys_in_progress(running) if blocks.prefix_caching else set()

    def cached_blocks(self, sequence: Sequence) -> int:
        """Leading blocks that it could take from the prefix cache."""
        return self._blocks.cache.match(sequence.keys, sequence.max_cached_tokens // self._blocks.block_size)

    def is_in_progress(self, sequence: Sequence, num_cached: int) -> bool:
        """Whether a running row is about to compute the first block that ``sequence`` lacks."""
        usable = sequence.max_cached_tokens // self._blocks.block_size
        return num_cached < min(usable, len(sequence.keys)) and sequence.keys[num_cached] in self._next_keys

    def fits(self, sequence: Sequence, num_cached: int, length: int) -> bool:
        """Whether there are blocks for its first span now, and for all that run at their foretold peak."""
        blocks, size = self._blocks, self._blocks.block_size
        idle = blocks.cache.count_idle(sequence.keys, num_cached)
        if blocks.blocks_for(num_cached * size + length) - num_cached + idle > blocks.num_available:
            return False
        if not len(self._held):
            return True
        held, remaining = self._need(sequence, num_cached)
        peak = peak_tokens(np.append(self._held, held), np.append(self._remaining, remaining))
        return self._shared + idle * size + peak <= blocks.num_usable * size

    def start(self, sequence: Sequence, num_cached: int) -> None:
        """Count ``sequence`` among those that run; its cached blocks are not held yet."""
        size = self._blocks.block_size
        held, remaining = self._need(sequence, num_cached)
        self._held = np.append(self._held, held)
        self._remaining = np.append(self._remaining, remaining)
        self._shared += self._blocks.cache.count_idle(sequence.keys, num_cached) * size
        if num_cached < len(sequence.keys):
            self._next_keys.add(sequence.keys[num_cached])

    def _need(self, sequence: Sequence, num_cached: int) -> tuple[float, float]:
        length, blocks = len(sequence.tokens), self._blocks
        held = length + (blocks.block_size - 1) - num_cached * blocks.block_size
        generated, room = length - sequence.num_prompt_tokens, sequence.max_length - length
        (remaining,) = self._forecast.remaining(np.array([generated], np.int32), np.array([room], np.int32))
        return float(held), float(remaining)

    def _keys_in_progress(self, running: Int32Array) -> set[bytes]:
        shared = self._rows.shared_blocks[running]
        unfinished = running[shared < self._rows.known[running] // self._blocks.block_size]
        keys = set()
        for row in unfinished.tolist():
            sequence, index = self._rows.sequences[row], int(self._rows.shared_blocks[row])
            if index < len(sequence.keys):
                keys.add(sequence.keys[index])
        return keys
