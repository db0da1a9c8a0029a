"""The sizes at which a step runs: exact, or padded up to the backend's buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from isthmus.contract import BlockCount, Capabilities, GraphScope, Limits, ShapePolicy, SpanMix, StepShape
from isthmus.plan import Int32Array, StepPlan

LARGEST_CAPTURED: Final = 512
"""Rows beyond which a decode step takes the device longer than its launches take the host."""
MIXED_SPANS: Final = 128
"""Spans that a captured step of any lengths holds at most.  It computes logits for as many: the output
projection's weight is read for each of them in the time that one takes."""


class Padding:
    """Pads a step's counts as ``capabilities.shapes`` says, never past the limits given."""

    def __init__(self, capabilities: Capabilities, limits: Limits) -> None:
        self._capabilities = capabilities
        self._limits = limits
        self._block_size = limits.block_size
        self._apart = capabilities.span_mix is SpanMix.SINGLES_APART
        self._count_all = capabilities.blocks_counted is BlockCount.ALL_ROWS
        self._most_long = _most_long(capabilities, limits)
        self.bucketed: Final = capabilities.shapes is ShapePolicy.BUCKETED
        self._tokens = self._spans = self._row_blocks = self._all_blocks = []
        if self.bucketed:
            a_row = limits.max_blocks_per_row
            self._tokens = _sizes(capabilities.token_buckets, most_tokens(capabilities, limits))
            self._spans = _sizes(capabilities.span_buckets, limits.max_rows)
            self._row_blocks = _sizes(capabilities.block_buckets, a_row)
            self._all_blocks = _sizes(capabilities.block_buckets, a_row * limits.max_rows)

    def shape(self, plan: StepPlan) -> StepShape:
        tokens, spans = plan.num_tokens, plan.num_spans
        if not self.bucketed:
            # A step that samples nothing has no logits.
            return StepShape(tokens, spans, int(plan.span_samples.sum()), single=tokens == spans)
        single = self._apart and tokens == spans
        blocks = -(-(plan.span_starts + plan.span_lengths) // self._block_size)
        padded = self._most_long if self._apart and not single else _padded(spans, self._spans)
        return StepShape(
            tokens=padded if single else _padded(tokens, self._tokens),
            spans=padded,
            samples=padded,
            blocks=self._padded_blocks(blocks, sums=self._sums(single)),
            single=single,
        )

    def _sums(self, single: bool) -> bool:
        """Whether a step's blocks are those of all its rows together."""
        return self._count_all and (single or not self._apart)

    def _padded_blocks(self, blocks: Int32Array, *, sums: bool) -> int:
        if not self._row_blocks:
            return 0
        if sums:
            return _padded(int(blocks.sum()), self._all_blocks)
        return _padded(int(blocks.max(initial=1)), self._row_blocks)

    def shapes(self) -> list[StepShape]:
        """Every shape that a graph is captured for: one with ``graph_any_size``; all that a step can have
        where they are bucketed; and else those of decode steps and of ``mixed_graph_tokens``, of which a
        step takes the next larger one."""
        if self._capabilities.graph_any_size:
            most, whole_steps = self._limits.max_rows, self._capabilities.graph_scope is GraphScope.STEP
            size = most if whole_steps else most_tokens(self._capabilities, self._limits)
            return [StepShape(size, most, min(most, size), single=whole_steps)]
        if not self.bucketed:
            rows = decode_sizes(min(self._limits.max_rows, self._limits.max_tokens))
            return [*(StepShape(size, size, size, single=True) for size in rows), *self._mixed_shapes()]
        return [*self._single_shapes(), *self._other_shapes()] if self._apart else list(self._other_shapes())

    def _mixed_shapes(self) -> Iterator[StepShape]:
        most = most_tokens(self._capabilities, self._limits)
        for tokens in sorted({min(size, most) for size in self._capabilities.mixed_graph_tokens}):
            spans = min(tokens, self._limits.max_rows, MIXED_SPANS)
            yield StepShape(tokens, spans, spans)

    def _single_shapes(self) -> Iterator[StepShape]:
        for fewest, spans in _ranges(self._spans):
            if fewest <= self._limits.max_tokens:
                for blocks in self._reachable_blocks(fewest, fewest, spans, sums=self._sums(True)):
                    yield StepShape(spans, spans, spans, blocks, single=True)

    def _other_shapes(self) -> Iterator[StepShape]:
        for fewest, tokens in _ranges(self._tokens):
            if self._apart:
                spans_of = [(1, self._most_long)] if tokens > 1 else []
            else:
                spans_of = [(least, most) for least, most in _ranges(self._spans) if least <= tokens]
            for least, spans in spans_of:
                for blocks in self._reachable_blocks(fewest, least, spans, sums=self._sums(False)):
                    yield StepShape(tokens, spans, spans, blocks)

    def _reachable_blocks(self, tokens: int, least_spans: int, spans: int, *, sums: bool) -> Iterator[int]:
        """Block buckets of steps of at least ``tokens`` tokens over ``least_spans`` to ``spans`` spans."""
        if not self._row_blocks:
            yield 0
        widest = self._limits.max_blocks_per_row
        for fewest, blocks in _ranges(self._all_blocks if sums else self._row_blocks):
            if sums:
                least, most = max(least_spans, -(-tokens // self._block_size)), widest * spans
            else:
                least, most = -(-tokens // (spans * self._block_size)), widest
            if least <= blocks and fewest <= most:
                yield blocks


def most_tokens(capabilities: Capabilities, limits: Limits) -> int:
    """Tokens that one step can have at most."""
    return max(min(limits.max_tokens, most_spans(capabilities, limits) * limits.max_model_len), 1)


def most_spans(capabilities: Capabilities, limits: Limits) -> int:
    """Spans that a step of :func:`most_tokens` can have at most."""
    return _most_long(capabilities, limits) if capabilities.span_mix is SpanMix.SINGLES_APART else limits.max_rows


def decode_sizes(max_rows: int) -> list[int]:
    """Rows at which decode steps are captured: 1, 2, 4, every 8th to 256, then every 16th; the largest included."""
    largest = min(max_rows, LARGEST_CAPTURED)
    return sorted({size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 512, 16)) if size < largest} | {largest})


def _most_long(capabilities: Capabilities, limits: Limits) -> int:
    return min(capabilities.max_long_spans or limits.max_rows, limits.max_rows)


def _sizes(buckets: Sequence[int], most: int) -> list[int]:
    """Buckets below ``most``, and ``most`` itself, so that every step fits one."""
    return [*sorted({size for size in buckets if size < most}), most] if buckets else []


def _ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The counts, from and to, that each size holds."""
    return ((before + 1, size) for before, size in pairwise([0, *sizes]))


def _padded(count: int, sizes: Sequence[int]) -> int:
    return sizes[bisect_left(sizes, count)] if sizes else count
