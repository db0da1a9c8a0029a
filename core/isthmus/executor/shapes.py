"""The sizes at which a step runs: exact, or padded up to the backend's buckets."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final, NamedTuple

from isthmus.contract import Capabilities, ShapePolicy
from isthmus.plan import StepPlan


class StepShape(NamedTuple):
    tokens: int
    spans: int
    samples: int


class Padding:
    """Pads a step's counts as ``capabilities.shapes`` says, never past the limits given."""

    def __init__(self, capabilities: Capabilities, max_tokens: int, max_rows: int) -> None:
        bucketed = capabilities.shapes is ShapePolicy.BUCKETED
        self._tokens = _sizes(capabilities.token_buckets, max_tokens) if bucketed else []
        self._spans = _sizes(capabilities.span_buckets, max_rows) if bucketed else []

    def shape(self, plan: StepPlan) -> StepShape:
        samples = int(plan.span_samples.sum())
        return StepShape(
            tokens=_padded(plan.num_tokens, self._tokens),
            spans=_padded(plan.num_spans, self._spans),
            # A step that samples nothing has no logits, so there is nothing to pad.
            samples=_padded(samples, self._spans) if samples else 0,
        )

    def decode_shape(self, rows: int) -> StepShape:
        """Of a step in which ``rows`` rows compute one token each and all sample it."""
        spans = _padded(rows, self._spans)
        return StepShape(tokens=_padded(rows, self._tokens), spans=spans, samples=spans)

    @property
    def is_exact(self) -> bool:
        return not (self._tokens or self._spans)


def _sizes(buckets: tuple[int, ...], most: int) -> list[int]:
    """Buckets below ``most``, and ``most`` itself, so that every step fits one."""
    return [*sorted({size for size in buckets if size < most}), most] if buckets else []


def _padded(count: int, sizes: list[int]) -> int:
    return sizes[bisect_left(sizes, count)] if sizes else count


LARGEST_CAPTURED: Final = 512
"""Rows beyond which a decode step takes the device longer than its launches take the host."""


def decode_sizes(max_rows: int) -> list[int]:
    """Rows at which decode steps are captured: 1, 2, 4, every 8th to 256, then every 16th; the largest included."""
    largest = min(max_rows, LARGEST_CAPTURED)
    return sorted({size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 512, 16)) if size < largest} | {largest})
