"""Counters of the scheduler, under the names they have in ``EngineStats``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """``num_blocks = num_free_blocks + num_cached_blocks + those that rows hold``; the spare block is not counted.

    Counters count from the start; ``step_tokens`` holds the steps since it was last asked for.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    """Cached blocks that no row holds: free for whoever needs them."""
    block_size: int
    kv_waste: float
    steps: int
    prompt_tokens: int
    computed_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    invalid_rows: int
    step_tokens: tuple[int, ...]
