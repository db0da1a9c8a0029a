"""How a step's token budget is shared out among spans, under what the device can mix."""

from __future__ import annotations

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


class EqualSpans:
    """All spans of a step have one length: steps of one token and longer ones take turns.

    A longer step is as long as the least that any unfinished row needs, so nobody is padded.
    """

    def __init__(self) -> None:
        self._length = 0
        self._last_was_long = False
        self._single_rows = False

    def share(self, needed: Int32Array, budget: int, more_waiting: bool) -> Int32Array:
        single, long = needed == 1, needed > 1
        self._single_rows = bool(single.any())
        if self._single_rows and (self._last_was_long or not (more_waiting or long.any())):
            self._length, group = 1, single
        elif long.any():
            self._length, group = min(int(needed[long].min()), budget), long
        else:
            self._length, group = 0, long
        lengths = np.zeros_like(needed)
        if self._length:
            lengths[np.flatnonzero(group)[: budget // self._length]] = self._length
        return lengths

    def offer(self, needed: int, budget: int) -> int:
        length = self._length or min(needed, budget)
        joins_singles = length == 1 < needed and self._single_rows
        return 0 if length > min(needed, budget) or joins_singles else length

    def started(self, length: int) -> None:
        self._length = length

    def planned(self) -> None:
        self._last_was_long = self._length > 1

    def retry(self) -> bool:
        if self._last_was_long or not self._single_rows:
            return False
        self._last_was_long = True
        return True


def span_policy(mix: SpanMix) -> SpanPolicy:
    return MixedSpans() if mix is SpanMix.ANY else EqualSpans()
