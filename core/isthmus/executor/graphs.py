"""Captured graphs of a step, and which step replays which."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from isthmus.contract import CapturedGraph, GraphScope


@dataclass(frozen=True, slots=True)
class Captured:
    """``output`` is written again by each replay: what was sampled (scope "step"), logits, or the
    hidden states where one graph serves every size (scope "forward")."""

    size: int
    graph: CapturedGraph
    output: Any


@dataclass(slots=True)
class StepGraphs:
    """Graphs by size.  Decode steps of up to ``size`` rows fit; with ``any_shape`` (one forward
    captured at the most tokens a step may have) every step fits."""

    scope: GraphScope = GraphScope.NONE
    any_shape: bool = False
    captured: tuple[Captured, ...] = ()  # smallest first
    capture_s: float = 0.0

    def find(self, tokens: int, *, decode: bool) -> Captured | None:
        """The smallest graph that holds the step, or ``None``: run it eagerly."""
        if not (decode or self.any_shape):
            return None
        index = bisect_left(self.captured, tokens, key=lambda c: c.size)
        return self.captured[index] if index < len(self.captured) else None


def capture_all(
    scope: GraphScope, sizes: Iterable[int], capture: Callable[[int], tuple[CapturedGraph, Any]], *, any_shape: bool
) -> StepGraphs:
    """Capture every size, the largest first so that the smaller ones fit into its memory.

    Raises what ``capture`` raises, :class:`isthmus.errors.Unsupported` among it.
    """
    began = time.perf_counter()
    captured = [Captured(size, *capture(size)) for size in sorted(sizes, reverse=True)]
    return StepGraphs(
        scope=scope,
        any_shape=any_shape,
        captured=tuple(reversed(captured)),
        capture_s=time.perf_counter() - began,
    )
