"""Captured graphs of a step, and which step replays which."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from isthmus.contract import CapturedGraph, GraphScope
from isthmus.executor.out_of_memory import is_out_of_memory


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
    notes: tuple[str, ...] = ()

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

    Stops where memory ends: steps below the last size captured are padded up to it.  Raises what
    else ``capture`` raises, :class:`isthmus.errors.Unsupported` among it.
    """
    began = time.perf_counter()
    captured: list[Captured] = []
    note = ""
    for size in sorted(sizes, reverse=True):
        try:
            captured.insert(0, Captured(size, *capture(size)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smallest = f"; the smallest graph holds {captured[0].size} rows" if captured else ": steps run eagerly"
            note = f"no memory was left to capture a graph of size {size}{smallest}"
            break
    return StepGraphs(
        scope=scope,
        any_shape=any_shape,
        captured=tuple(captured),
        capture_s=time.perf_counter() - began,
        notes=(note,) if note else (),
    )
