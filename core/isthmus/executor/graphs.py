"""Captured graphs of a step, and which step replays which."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from isthmus.contract import CapturedGraph, GraphScope, StepShape
from isthmus.executor.out_of_memory import is_out_of_memory


@dataclass(frozen=True, slots=True)
class Captured:
    """A replay returns what was sampled (scope "step"), logits and inputs (scope "forward"), or the
    hidden states where one graph serves every size."""

    shape: StepShape
    graph: CapturedGraph[Any]


@dataclass(slots=True, kw_only=True)
class StepGraphs:
    scope: GraphScope = GraphScope.NONE
    any_shape: bool = False
    """One forward, captured at the most tokens a step may have, serves every step."""
    exact: bool = True
    """A step takes the smallest graph of its kind that holds it; otherwise that of its own shape."""
    captured: tuple[Captured, ...] = ()  # smallest first
    capture_s: float = 0.0
    notes: tuple[str, ...] = ()
    _by_shape: dict[StepShape, Captured] = field(init=False)
    _decode: tuple[Captured, ...] = field(init=False)
    _mixed: tuple[Captured, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._by_shape = {item.shape: item for item in self.captured}
        self._decode = tuple(item for item in self.captured if item.shape.single)
        self._mixed = tuple(item for item in self.captured if not item.shape.single)

    def find(self, shape: StepShape, *, all_sampled: bool) -> Captured | None:
        """The graph that serves the step, or ``None``: run it eagerly.

        ``all_sampled``: every span samples, as those of a captured decode step do.
        """
        if not self.exact:
            return self._by_shape.get(shape)
        if self.any_shape or not shape.single:
            return _next_larger(self._mixed, shape)
        return _next_larger(self._decode, shape) if all_sampled else None


def _next_larger(captured: tuple[Captured, ...], shape: StepShape) -> Captured | None:
    index = bisect_left(captured, shape.tokens, key=lambda item: item.shape.tokens)
    if index == len(captured) or captured[index].shape.spans < shape.spans:
        return None
    return captured[index]


def capture_all(
    shapes: Iterable[StepShape], capture: Callable[[StepShape], CapturedGraph[Any]]
) -> tuple[list[Captured], tuple[str, ...], float]:
    """Capture every shape, the largest first so that the smaller ones fit into its memory.

    Returns what was captured, smallest first, notes, and the seconds it took.  Stops where memory
    ends.  Raises what else ``capture`` raises, :class:`isthmus.errors.Unsupported` among it.
    """
    began = time.perf_counter()
    captured: list[Captured] = []
    notes: tuple[str, ...] = ()
    for shape in sorted(shapes, reverse=True):
        try:
            captured.insert(0, Captured(shape, capture(shape)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            left = f"the smallest graph holds {captured[0].shape.tokens} rows" if captured else "steps run eagerly"
            notes = (f"no memory was left to capture a graph of size {shape.tokens}: {left}",)
            break
    return captured, notes, time.perf_counter() - began
