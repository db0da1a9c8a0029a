"""Laying out memory whose times of use are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

ALIGNMENT: Final = 64


class Life(NamedTuple):
    """Used from step ``first`` to step ``last``, both included."""

    first: int
    last: int
    nbytes: int


def place(lives: Sequence[Life]) -> tuple[list[int], int]:
    """An offset for each, such that no two in use at once overlap, and the bytes taken in all.

    Greedy by size (Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference,
    2020): the largest first, each into the lowest gap that holds it.
    """
    offsets = [0] * len(lives)
    placed: list[tuple[int, int, Life]] = []
    total = 0
    for index in sorted(range(len(lives)), key=lambda i: -lives[i].nbytes):
        life = lives[index]
        size = -(-life.nbytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for begin, end, other in sorted(placed):
            if other.last < life.first or life.last < other.first:
                continue
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[index] = offset
        placed.append((offset, offset + size, life))
        total = max(total, offset + size)
    return offsets, total
