"""Sizes that a compiled step is padded up to.

Each function proposes sizes for one axis (tokens, spans, blocks) as an ascending tuple whose last
is ``most``, and says how far a count can lie below the size that holds it.  Fewer sizes mean fewer
graphs to compile before readiness; closer sizes mean less padding afterwards.

The three ways of spacing are those of vllm-gaudi (``extension/bucketing/{exponential,linear,padding_aware}.py``),
written anew: there an exponential range is spread over a given number of graphs, a linear one doubles up to its step
and then repeats it, and a padding-aware one thins the linear one out by the padding it leaves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def exponential(least: int, most: int) -> tuple[int, ...]:
    """``least``, then doubling, then ``most``: about ``log2(most / least) + 2`` sizes.

    For every ``1 <= n <= most`` the size that holds ``n`` is at most ``max(least, 2 * n - 1)``, so less than
    half of a step is padding once ``n > least``.
    """
    assert least >= 1 and most >= 1, f"sizes from {least} to {most}"
    sizes = []
    size = least
    while size < most:
        sizes.append(size)
        size *= 2
    return (*sizes, most)


def linear(least: int, step: int, most: int) -> tuple[int, ...]:
    """``least``, doubling while below ``step``, then the multiples of ``step``, then ``most``.

    For every ``1 <= n <= most`` the size that holds ``n`` is at most ``max(least, min(2 * n, n + step) - 1)``:
    never ``step`` or more places of padding, and small counts are not padded up to a whole step.
    """
    assert 1 <= least <= step and most >= 1, f"sizes from {least} by {step} to {most}"
    ramp = [size for size in exponential(least, step) if size < min(step, most)]
    return (*ramp, *range(step, most, step), most)


def padding_aware(step: int, most: int, percent: int = 25) -> tuple[int, ...]:
    """The fewest multiples of ``step``, and ``most``, that keep padding to ``percent`` of a size.

    For every ``1 <= n <= most`` the size ``s`` that holds ``n`` has ``s - n < step`` or
    ``100 * (s - n) <= percent * s``.  ``step`` is the floor below which padding is not worth a graph, and a size
    that the device likes (its tile, or a block).  ``percent`` is a share of the padded size: 50 doubles.
    """
    assert step >= 1 and most >= 1 and 0 <= percent < 100, f"sizes by {step} to {most} within {percent} %"
    sizes: list[int] = []
    size = 0
    while size < most:
        # A size is worst used by the count just above the size before; going as far as that count allows is what
        # makes the sizes few, since a later start never reaches less far.
        reach = 100 * (size + 1) // (100 - percent)
        size = most if reach >= most else min(max(size + step, reach // step * step), most)
        sizes.append(size)
    return tuple(sizes)


def holding(sizes: Sequence[int], n: int) -> int:
    """The smallest of ascending ``sizes`` that is ``n`` or more."""
    assert sizes and n <= sizes[-1], f"{n} is more than the largest size of {tuple(sizes)}"
    return sizes[bisect_left(sizes, n)]
