"""How much KV the running sequences will need at their peak, so that few have to be preempted.

After the Past-Future scheduler (Gong et al., ASPLOS 2025; LightLLM): output lengths are foretold
from those seen lately, and a request starts if the peak of future need fits, not this step's need.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from isthmus.plan import Int32Array

FloatArray = NDArray[np.float64]


class OutputForecast:
    """Foretells how many tokens a sequence has still to generate.

    The window is wide because what ends last in a burst is what was long: a narrow one would take
    the burst's tail for the whole.
    """

    def __init__(self, window: int = 2048, prior: int = 128) -> None:
        self._lengths: deque[int] = deque(maxlen=window)
        self._prior = prior

    def record(self, num_generated: int) -> None:
        self._lengths.append(num_generated)

    def remaining(self, generated: Int32Array, room: Int32Array) -> FloatArray:
        """Expected further tokens of sequences that have ``generated`` some and have ``room`` for more.

        The mean of those lately finished that were longer; where none was, as long again.
        """
        past = np.sort(np.array(self._lengths, np.float64))
        longer = np.searchsorted(past, generated, side="right")
        sums = np.append(np.cumsum(past[::-1])[::-1], 0.0)
        counts = len(past) - longer
        means = sums[longer] / np.maximum(counts, 1) - generated
        guesses = np.where(counts > 0, means, np.maximum(generated, self._prior))
        return np.minimum(guesses, room)


def peak_tokens(held: FloatArray, remaining: FloatArray) -> float:
    """The most tokens that sequences hold at once until all have ended.

    They grow by one a step; just before the one with the k-th most to go ends, it and the k - 1
    that outlast it have grown by its ``remaining``.
    """
    order = np.argsort(-remaining, kind="stable")
    alive = np.arange(1, len(order) + 1)
    return float((np.cumsum(held[order]) + alive * remaining[order]).max(initial=0.0))
