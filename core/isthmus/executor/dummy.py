"""Plans with no sequence behind them, for warming up, measuring and capturing.

Their block tables are unset, so everything they write goes to the spare block, and what they leave
in the rows' state is void as soon as a sequence starts there.
"""

from __future__ import annotations

import numpy as np

from isthmus.contract import Capabilities, Limits, SpanMix, StepShape
from isthmus.executor.shapes import most_spans, most_tokens
from isthmus.plan import RowStart, StepPlan
from isthmus.sampling_params import RowSampling


def dummy_plan(lengths: list[int], sampling: RowSampling | None = None) -> StepPlan:
    """Rows 0, 1, ... compute their first ``lengths`` positions, and each samples."""
    parameters = sampling or RowSampling(max_tokens=1)
    return StepPlan(
        step=0,
        starts=tuple(
            RowStart(row=row, tokens=np.zeros(length, np.int32), num_prompt_tokens=length, sampling=parameters)
            for row, length in enumerate(lengths)
        ),
        span_rows=np.arange(len(lengths), dtype=np.int32),
        span_starts=np.zeros(len(lengths), np.int32),
        span_lengths=np.array(lengths, np.int32),
        span_samples=np.ones(len(lengths), np.bool_),
    )


def decode_plan(rows: int) -> StepPlan:
    return dummy_plan([1] * rows)


def even_plan(shape: StepShape) -> StepPlan:
    """All tokens of the shape, dealt to as many rows as it may sample, or to fewer where that comes out even."""
    longest = -(-shape.tokens // shape.samples)
    rows = range(-(-shape.tokens // longest))
    return dummy_plan([min(longest, shape.tokens - row * longest) for row in rows])


def largest_plan(limits: Limits, capabilities: Capabilities) -> StepPlan:
    """A step of as many tokens as one can have that samples as many rows as can share them."""
    tokens = most_tokens(capabilities, limits)
    least = 2 if capabilities.span_mix is SpanMix.SINGLES_APART and min(tokens, limits.max_model_len) > 1 else 1
    rows = max(min(most_spans(capabilities, limits), tokens // least), 1)
    lengths = [least] * rows
    left = tokens - least * rows
    for row in range(rows):
        more = min(left, limits.max_model_len - least)
        lengths[row] += more
        left -= more
    return dummy_plan(lengths)


def plan_of_shape(shape: StepShape, limits: Limits) -> StepPlan:
    """A step to capture ``shape`` with: as many spans as there may be, one token each or all tokens in the first ones.

    What it leaves unfilled is padding, which a captured shape holds anyway.
    """
    if shape.tokens == shape.spans:
        return decode_plan(min(shape.spans, limits.max_rows, limits.max_tokens))
    lengths: list[int] = []
    left = shape.tokens
    while left and len(lengths) < shape.spans:
        lengths.append(min(left, limits.max_model_len))
        left -= lengths[-1]
    return dummy_plan(lengths)
