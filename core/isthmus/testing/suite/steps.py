"""Plans made by hand, and a device's parts driven by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from isthmus.contract import Capabilities, Limits, Sampled, ShapePolicy, SpanMix, StepInputs
from isthmus.plan import Int32Array, RowStart, StepPlan
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest

GREEDY = RowSampling(max_tokens=1)


def ints(values: Sequence[int]) -> Int32Array:
    return np.array(values, np.int32)


@dataclass(frozen=True, slots=True)
class Span:
    row: int
    start: int
    length: int
    samples: bool = True


@dataclass(slots=True)
class Starting:
    """A row that begins: its tokens so far and its block table."""

    tokens: Sequence[int]
    blocks: Sequence[int] = ()
    num_prompt_tokens: int = 0
    """0: all of ``tokens``."""
    sampling: RowSampling = GREEDY


def plan_of(
    step: int,
    spans: Sequence[Span],
    starts: Mapping[int, Starting] | None = None,
    appends: Sequence[tuple[int, int, int]] = (),
) -> StepPlan:
    """``appends`` are (row, place in its table, block) beyond what ``starts`` bring."""
    begun = starts or {}
    appends = [
        *((row, place, block) for row, start in begun.items() for place, block in enumerate(start.blocks)),
        *appends,
    ]
    return StepPlan(
        step=step,
        starts=tuple(
            RowStart(
                row=row,
                tokens=ints(start.tokens),
                num_prompt_tokens=start.num_prompt_tokens or len(start.tokens),
                sampling=start.sampling,
            )
            for row, start in begun.items()
        ),
        block_rows=ints([row for row, _, _ in appends]),
        block_indices=ints([place for _, place, _ in appends]),
        block_ids=ints([block for _, _, block in appends]),
        span_rows=ints([span.row for span in spans]),
        span_starts=ints([span.start for span in spans]),
        span_lengths=ints([span.length for span in spans]),
        span_samples=np.array([span.samples for span in spans], np.bool_),
    )


def fitting(capabilities: Capabilities, *, rows: int, tokens: int) -> tuple[int, int]:
    """Limits near ``rows`` and ``tokens`` that a backend with buckets has room for."""
    if capabilities.shapes is ShapePolicy.BUCKETED:
        rows = min(rows, max(capabilities.span_buckets, default=rows))
        tokens = min(tokens, max(capabilities.token_buckets, default=tokens))
    return rows, max(tokens, rows)


def mixable(capabilities: Capabilities, lengths: Sequence[int]) -> list[int]:
    """``lengths``, or the part of them that may share a step: all of one token if the first is, else the others."""
    if capabilities.span_mix is not SpanMix.SINGLES_APART:
        return list(lengths)
    if lengths[0] == 1:
        return [1] * len(lengths)
    longer = [max(length, 2) for length in lengths]
    return longer[: capabilities.max_long_spans or len(longer)]


@dataclass(slots=True)
class Stepper:
    """Inputs and sampling of a device, driven as the executor does."""

    device: DeviceUnderTest
    limits: Limits
    rows: Any = field(init=False)
    """:class:`isthmus.contract.DeviceState`."""
    state: Any = field(init=False)
    """Whatever the sampling keeps."""

    def __post_init__(self) -> None:
        parts = self.device.parts
        self.rows = self.device.run(lambda: parts.inputs.allocate(self.limits))
        self.state = self.device.run(lambda: parts.sampling.allocate(self.limits))

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Called inside :meth:`DeviceUnderTest.run`."""
        parts = self.device.parts
        parts.inputs.upload(plan, self.rows)
        parts.sampling.apply(self.state, plan)
        return parts.inputs.build(self.rows, self.device.padding(self.limits).shape(plan))

    def sample(self, plan: StepPlan, logits: Tensor, num_logprobs: int = -1) -> dict[str, np.ndarray[Any, Any]]:
        """``logits`` [samples, vocab]; rows are added where the device pads."""
        parts = self.device.parts

        def step() -> Any:
            inputs = self.prepare(plan)
            padded = logits.new_zeros(inputs.num_samples, logits.shape[1])
            padded[: len(logits)] = logits
            sampled = parts.sampling.sample(self.device.put(padded), inputs, self.rows, self.state, num_logprobs)
            return parts.memory.fetch([part[: len(logits)] for part in fields_of(sampled)])

        arrays = self.device.run(step).result()
        return dict(zip(NAMES, arrays, strict=False))


NAMES = ("tokens", "invalid", "chosen_logprobs", "ranks", "top_ids", "top_logprobs")


def fields_of(sampled: Sampled) -> list[Tensor]:
    found = [getattr(sampled, name) for name in NAMES]
    return [part for part in found if part is not None]
