"""How a step's token budget is shared out among spans, under what the device can mix."""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

import numpy as np

from isthmus.contract.capabilities import SpanMix
from isthmus.plan import Int32Array


class SpanPolicy(Protocol):
    def share(self, needed: Int32Array, budget: int, more_waiting: bool) -> Int32Array:
        """Span lengths, 0 for none, of running rows that have ``needed`` tokens to compute."""
        ...

    def offer(self, needed: int, budget: int) -> int:
        """Span length, 0 for none, of a row that would begin in this step with ``budget`` left."""
        ...

    def started(self, length: int) -> None:
        """A row begins with the span that was offered."""
        ...

    def planned(self) -> None:
        """The spans shared out make up a step."""
        ...

    def retry(self) -> bool:
        """Nothing could begin: whether :meth:`share` would now find other work for the step."""
        ...


class MixedSpans:
    """Spans of any lengths together: one token rows first, so that they never stand still."""

    def share(self, needed: Int32Array, budget: int, more_waiting: bool) -> Int32Array:
        if int(needed.sum()) <= budget:
            return needed
        order = np.argsort(needed > 1, kind="stable")
        wanted = needed[order]
        lengths = np.empty_like(needed)
        lengths[order] = np.clip(budget - (np.cumsum(wanted) - wanted), 0, wanted)
        return lengths

    def offer(self, needed: int, budget: int) -> int:
        return min(needed, budget)

    def started(self, length: int) -> None:
        pass

    def planned(self) -> None:
        pass

    def retry(self) -> bool:
        return False


class SeparateSpans:
    """Spans of one token and longer ones take turns: a step holds one kind.

    A longer span has at least two tokens, and a step has at most ``max_long`` of them.
    """

    def __init__(self, max_long: int) -> None:
        self._max_long = max_long
        self._room = 0
        """Longer spans that may still join the step."""
        self._kind: _Kind = _Kind.OPEN
        self._last_was_long = False
        self._single_rows = False

    def share(self, needed: Int32Array, budget: int, more_waiting: bool) -> Int32Array:
        needed = np.minimum(needed, budget)
        single, long = needed == 1, needed > 1
        self._single_rows = bool(single.any())
        self._room = self._max_long
        lengths = np.zeros_like(needed)
        if self._single_rows and (self._last_was_long or not (more_waiting or long.any())):
            self._kind = _Kind.SINGLE
            lengths[np.flatnonzero(single)[:budget]] = 1
        elif long.any():
            self._kind = _Kind.LONG
            rows = np.flatnonzero(long)[: self._max_long]
            before = np.cumsum(needed[rows]) - needed[rows]
            lengths[rows] = np.clip(budget - before, 0, needed[rows])
            lengths[lengths == 1] = 0
            self._room -= int(np.count_nonzero(lengths))
        else:
            self._kind = _Kind.OPEN
        return lengths

    def offer(self, needed: int, budget: int) -> int:
        length = min(needed, budget)
        if length < 1:
            return 0
        if length == 1:
            # With rows of one token running, it joins them in their turn.
            return int(self._kind is _Kind.SINGLE or (self._kind is _Kind.OPEN and not self._single_rows))
        return length if self._kind is not _Kind.SINGLE and self._room else 0

    def started(self, length: int) -> None:
        if self._kind is _Kind.OPEN:
            self._kind = _Kind.LONG if length > 1 else _Kind.SINGLE
        self._room -= length > 1

    def planned(self) -> None:
        self._last_was_long = self._kind is _Kind.LONG

    def retry(self) -> bool:
        if self._last_was_long or not self._single_rows:
            return False
        self._last_was_long = True
        return True


class _Kind(Enum):
    OPEN = auto()
    SINGLE = auto()
    LONG = auto()


def span_policy(mix: SpanMix, max_long_spans: int, max_rows: int) -> SpanPolicy:
    """``max_long_spans`` of 0 is no bound."""
    return MixedSpans() if mix is SpanMix.ANY else SeparateSpans(max_long_spans or max_rows)
