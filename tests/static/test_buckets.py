"""What the sizes of compiled steps guarantee, for every count they have to hold."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus_static.buckets import exponential, holding, linear, padding_aware

MOST = st.integers(1, 3000)
STEP = st.integers(1, 300)


def check(sizes: tuple[int, ...], most: int) -> None:
    assert list(sizes) == sorted(set(sizes)), "ascending, none twice"
    assert sizes[0] >= 1 and sizes[-1] == most


@settings(deadline=None)
@given(least=STEP, most=MOST)
def test_an_exponential_size_is_less_than_twice_its_count(least: int, most: int) -> None:
    sizes = exponential(least, most)
    check(sizes, most)
    assert all(n <= holding(sizes, n) <= max(least, 2 * n - 1) for n in range(1, most + 1))
    assert len(sizes) <= max(0, (most // least).bit_length()) + 1


@settings(deadline=None)
@given(least=STEP, more=STEP, most=MOST)
def test_a_linear_size_is_less_than_a_step_above_its_count(least: int, more: int, most: int) -> None:
    step = least + more - 1
    sizes = linear(least, step, most)
    check(sizes, most)
    assert all(n <= holding(sizes, n) <= max(least, min(2 * n, n + step) - 1) for n in range(1, most + 1))
    assert all(size % step == 0 for size in sizes[:-1] if size >= step)


@settings(deadline=None)
@given(step=STEP, most=MOST, percent=st.integers(0, 80))
def test_a_padding_aware_size_wastes_no_more_than_its_share(step: int, most: int, percent: int) -> None:
    sizes = padding_aware(step, most, percent)
    check(sizes, most)
    assert all(size % step == 0 for size in sizes[:-1])
    for n in range(1, most + 1):
        padding = holding(sizes, n) - n
        assert padding < step or 100 * padding <= percent * (padding + n)


@settings(deadline=None, max_examples=60)
@given(step=st.integers(1, 12), most=st.integers(1, 150), percent=st.integers(0, 80))
def test_no_padding_aware_choice_is_smaller(step: int, most: int, percent: int) -> None:
    candidates = [*range(step, most, step), most]

    @cache
    def fewest(below: int) -> int:
        """Sizes needed for the counts above ``below``, trying every next size."""
        if below == most:
            return 0
        allowed = (
            size
            for size in candidates
            if size > below and (size - below - 1 < step or 100 * (size - below - 1) <= percent * size)
        )
        return 1 + min(fewest(size) for size in allowed)

    assert len(padding_aware(step, most, percent)) == fewest(0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (exponential(16, 100), (16, 32, 64, 100)),
        (exponential(128, 100), (100,)),
        (exponential(1, 1), (1,)),
        (linear(2, 32, 64), (2, 4, 8, 16, 32, 64)),
        (linear(1, 12, 40), (1, 2, 4, 8, 12, 24, 36, 40)),
        (linear(8, 32, 20), (8, 16, 20)),
        (padding_aware(16, 128), (16, 32, 48, 64, 80, 96, 128)),
        (padding_aware(8, 64, 50), (8, 16, 32, 64)),
        (padding_aware(8, 64, 0), (8, 16, 24, 32, 40, 48, 56, 64)),
        (padding_aware(1, 20), (1, 2, 4, 6, 9, 13, 18, 20)),
        (padding_aware(256, 100), (100,)),
    ],
)
def test_sizes_by_example(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert sizes == expected


def test_a_count_past_the_largest_size_is_refused() -> None:
    assert holding((1, 2, 4), 3) == 4
    with pytest.raises(AssertionError, match="5 is more"):
        holding((1, 2, 4), 5)
