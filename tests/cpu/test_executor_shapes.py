"""Shapes of bucketed steps: every step that can be has one, and there is a graph for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contract import BlockCount, Capabilities, Limits, ShapePolicy, SpanMix
from isthmus.executor.dummy import largest_plan, plan_of_shape
from isthmus.executor.shapes import Padding, most_tokens
from isthmus.plan import StepPlan


def buckets(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, most), min_size=1, max_size=5).map(lambda sizes: tuple(sorted(sizes)))


@st.composite
def devices(draw: st.DrawFn) -> tuple[Capabilities, Limits]:
    mix = draw(st.sampled_from(SpanMix))
    limits = Limits(
        max_rows=draw(st.integers(1, 12)),
        max_tokens=draw(st.integers(1, 100)),
        max_model_len=draw(st.integers(1, 90)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        num_blocks=4,
        vocab_size=9,
    )
    capabilities = Capabilities(
        shapes=ShapePolicy.BUCKETED,
        token_buckets=draw(buckets(128)),
        span_buckets=draw(buckets(16)),
        block_buckets=draw(st.one_of(st.just(()), buckets(100))),
        blocks_counted=draw(st.sampled_from(BlockCount)),
        span_mix=mix,
        max_long_spans=draw(st.integers(0, 4)),
    )
    return capabilities, limits


@st.composite
def steps(draw: st.DrawFn) -> tuple[Capabilities, Limits, StepPlan]:
    """Any step that the scheduler may plan on such a device."""
    capabilities, limits = draw(devices())
    most = min(limits.max_rows, limits.max_tokens)
    long_only = capabilities.span_mix is SpanMix.SINGLES_APART and draw(st.booleans())
    longest = min(limits.max_model_len, limits.max_tokens)
    if long_only and longest > 1:
        count = draw(st.integers(1, max(min(most, capabilities.max_long_spans or most, limits.max_tokens // 2), 1)))
        lengths = [2] * count
    else:
        count = draw(st.integers(1, most))
        lengths = [1] * count
        long_only = False
    if long_only or capabilities.span_mix is SpanMix.ANY:
        for place in range(count):
            lengths[place] += draw(st.integers(0, min(longest - lengths[place], limits.max_tokens - sum(lengths))))
    starts = [draw(st.integers(0, limits.max_model_len - length)) for length in lengths]
    plan = StepPlan(
        step=0,
        span_rows=np.arange(count, dtype=np.int32),
        span_starts=np.array(starts, np.int32),
        span_lengths=np.array(lengths, np.int32),
        span_samples=np.array([draw(st.booleans()) for _ in lengths], np.bool_),
    )
    return capabilities, limits, plan


@given(steps())
def test_every_step_has_a_shape_that_is_captured(case: tuple[Capabilities, Limits, StepPlan]) -> None:
    capabilities, limits, plan = case
    padding = Padding(capabilities, limits)
    shape = padding.shape(plan)
    assert shape in padding.shapes()
    assert shape.tokens >= plan.num_tokens and shape.spans >= plan.num_spans
    blocks = -(-(plan.span_starts + plan.span_lengths) // limits.block_size)
    if capabilities.block_buckets:
        long = capabilities.span_mix is SpanMix.SINGLES_APART and not shape.single
        together = capabilities.blocks_counted is BlockCount.ALL_ROWS and not long
        assert shape.blocks >= (blocks.sum() if together else blocks.max())
        assert together or shape.blocks <= limits.max_blocks_per_row


@given(devices())
def test_shapes_stay_within_limits_and_can_be_captured(case: tuple[Capabilities, Limits]) -> None:
    capabilities, limits = case
    padding = Padding(capabilities, limits)
    shapes = padding.shapes()
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        assert shape.spans <= limits.max_rows and shape.samples == shape.spans
        assert shape.tokens <= max(most_tokens(capabilities, limits), shape.spans)
        plan = plan_of_shape(shape, limits)
        assert plan.num_tokens <= shape.tokens and plan.num_spans <= shape.spans
    assert padding.shape(largest_plan(limits, capabilities)) in shapes


def test_long_spans_that_are_apart_count_the_blocks_of_their_longest_row() -> None:
    limits = Limits(max_rows=8, max_tokens=64, max_model_len=64, block_size=16, num_blocks=9, vocab_size=9)
    capabilities = Capabilities(
        shapes=ShapePolicy.BUCKETED,
        token_buckets=(64,),
        span_buckets=(8,),
        block_buckets=(4, 8, 16),
        blocks_counted=BlockCount.ALL_ROWS,
        span_mix=SpanMix.SINGLES_APART,
        max_long_spans=2,
    )
    found = {(shape.tokens, shape.blocks) for shape in Padding(capabilities, limits).shapes()}
    assert found == {(8, 4), (8, 8), (8, 16), (8, 32), (64, 4)}


def test_a_shape_that_no_step_can_have_is_not_captured() -> None:
    limits = Limits(max_rows=8, max_tokens=64, max_model_len=64, block_size=16, num_blocks=9, vocab_size=9)
    settings: dict[str, Any] = {"token_buckets": (16, 64), "span_buckets": (1, 8), "block_buckets": (1, 2, 4)}
    apart = Capabilities(shapes=ShapePolicy.BUCKETED, span_mix=SpanMix.SINGLES_APART, max_long_spans=1, **settings)
    found = {(shape.tokens, shape.spans, shape.blocks) for shape in Padding(apart, limits).shapes()}
    singles = {(rows, rows, blocks) for rows in (1, 8) for blocks in (1, 2, 4)}
    # Seventeen tokens of one row take two blocks at least.
    assert found == singles | {(16, 1, 1), (16, 1, 2), (16, 1, 4), (64, 1, 2), (64, 1, 4)}
    unbounded = dataclasses.replace(apart, block_buckets=())
    assert len(Padding(unbounded, limits).shapes()) == 4
