"""Plans with no sequence behind them, for warming up, measuring and capturing.

Their block tables are unset, so everything they write goes to the spare block, and what they leave
in the rows' state is void as soon as a sequence starts there.
"""

from __future__ import annotations

import numpy as np

from isthmus.contract import Limits, SpanMix
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


def largest_plan(limits: Limits, mix: SpanMix) -> StepPlan:
    """A step of ``max_tokens`` tokens that samples as many rows as can share them."""
    tokens = min(limits.max_tokens, limits.max_rows * limits.max_model_len)
    rows = max(min(limits.max_rows, tokens), 1)
    if mix is SpanMix.SAME_LENGTH:
        return dummy_plan([max(tokens // rows, 1)] * rows)
    lengths = [1] * rows
    left = tokens - rows
    for row in range(rows):
        more = min(left, limits.max_model_len - 1)
        lengths[row] += more
        left -= more
    return dummy_plan(lengths)
