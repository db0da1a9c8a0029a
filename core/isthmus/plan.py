"""The narrow strip between the scheduler and the device: a step's plan and its result.

Plain data: ints, bytes, numpy arrays and structs of numbers.  No torch, so that a plan can be
logged, replayed and simulated anywhere.

Row ``r`` of the device holds one sequence for as long as it runs.  A *span* says that row ``r``
computes positions ``[start, start + length)`` in this step; prefill, chunked prefill, decode,
draft verification and forced tokens are all spans.  Tokens that the host does not know yet (they
are being sampled by a step still in flight) are read from the row's token history on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from isthmus.sampling_params import RowSampling

PLAN_VERSION: Final = 1

Int32Array: TypeAlias = NDArray[np.int32]
Float32Array: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]

EMPTY: Final[Int32Array] = np.zeros(0, np.int32)
EMPTY.setflags(write=False)


def _empty() -> Int32Array:
    return EMPTY


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStart:
    """Row ``row`` begins a sequence (or begins it again after preemption) in this step.

    Everything the row held before is void.  ``tokens`` are all tokens known so far: the prompt,
    then what was generated before a preemption.  The row's first block ids come with
    :attr:`StepPlan.block_ids` of the same step, cached prefix blocks included.
    """

    row: int
    tokens: Int32Array
    num_prompt_tokens: int
    sampling: RowSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step's work.  Arrays are parallel within a group and must not be written to."""

    step: int
    """Counts up from 0; a result carries the number of its plan."""

    starts: tuple[RowStart, ...] = ()

    block_rows: Int32Array = field(default_factory=_empty)  # [appends] row whose block table grows
    block_indices: Int32Array = field(default_factory=_empty)  # [appends] place in that row's block table
    block_ids: Int32Array = field(default_factory=_empty)  # [appends] the block put there

    span_rows: Int32Array = field(default_factory=_empty)  # [spans] a row appears at most once
    span_starts: Int32Array = field(
        default_factory=_empty
    )  # [spans] first position computed = tokens in the cache before
    span_lengths: Int32Array = field(default_factory=_empty)  # [spans] at least 1
    span_samples: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[spans] whether the logits of the span's last position are sampled."""

    @property
    def num_spans(self) -> int:
        return len(self.span_rows)

    @property
    def num_tokens(self) -> int:
        return int(self.span_lengths.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities for ``n`` positions, under the distribution before temperature and cuts.

    As in vLLM's ``raw_logprobs``: log-softmax of the model's own logits.
    """

    chosen: Float32Array  # [n] of the token that stands there
    ranks: Int32Array  # [n] 1 is the likeliest
    top_ids: Int32Array  # [n, k] likeliest first
    top_logprobs: Float32Array  # [n, k]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step sampled: one entry a span with ``span_samples``, in the plan's order."""

    step: int
    rows: Int32Array  # [samples]
    tokens: Int32Array  # [samples, width] width is 1 without speculation; -1 where absent
    invalid: BoolArray  # [samples] the row's logits held a NaN or only -inf; its token is void
    logprobs: TokenLogprobs | None = None
    """[samples] entries with k the largest any sampled row asked for; ``None`` if none asked."""
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By row: entries for the prompt positions ``start + 1 ... start + length`` of this step's
    span, that is, the log-probability of each *next* prompt token that exists."""
