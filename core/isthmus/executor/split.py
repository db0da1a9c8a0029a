"""A step cut into smaller ones that together do the same."""

from __future__ import annotations

import numpy as np

from isthmus.plan import EMPTY, StepPlan


def split(plan: StepPlan, max_tokens: int) -> list[StepPlan]:
    """Plans of at most ``max_tokens`` tokens, to be run in order.

    Rows start and blocks are appended in the first; the samples of all, one after another, are
    the samples of ``plan``.
    """
    assert max_tokens >= 1
    pieces: list[list[tuple[int, int, int, bool]]] = [[]]
    room = max_tokens
    spans = zip(
        plan.span_rows.tolist(),
        plan.span_starts.tolist(),
        plan.span_lengths.tolist(),
        plan.span_samples.tolist(),
        strict=True,
    )
    for row, start, length, samples in spans:
        at, end = start, start + length
        while at < end:
            if room == 0:
                pieces.append([])
                room = max_tokens
            count = min(room, end - at)
            pieces[-1].append((row, at, count, samples and at + count == end))
            at += count
            room -= count
    return [_part(plan, spans_of, first=index == 0) for index, spans_of in enumerate(pieces)]


def _part(plan: StepPlan, spans: list[tuple[int, int, int, bool]], *, first: bool) -> StepPlan:
    rows, starts, lengths, samples = zip(*spans, strict=True)
    return StepPlan(
        step=plan.step,
        starts=plan.starts if first else (),
        block_rows=plan.block_rows if first else EMPTY,
        block_indices=plan.block_indices if first else EMPTY,
        block_ids=plan.block_ids if first else EMPTY,
        span_rows=np.array(rows, np.int32),
        span_starts=np.array(starts, np.int32),
        span_lengths=np.array(lengths, np.int32),
        span_samples=np.array(samples, np.bool_),
    )
