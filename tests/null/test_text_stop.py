"""Stop strings are found wherever they are cut, and nothing else is held back."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.text.stop import StopStrings


def expected(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """By trying every end: the first match to end, the longest of those."""
    for end in range(1, len(text) + 1):
        met = [pattern for pattern in stop if text[:end].endswith(pattern)]
        if met:
            longest = max(met, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


STOP = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@given(text=st.text("ab\nc", max_size=40), stop=STOP, places=st.lists(st.integers(0, 40)), include=st.booleans())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_cut_gives_the_same(text: str, stop: list[str], places: list[int], include: bool) -> None:
    matcher = StopStrings(stop, include_in_output=include)
    shown = "".join(map(matcher.push, cut(text, places))) + matcher.finish()
    assert (shown, matcher.found) == expected(text, stop, include)


@given(text=st.text("ab\nc", max_size=40), stop=STOP)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_no_more_is_held_than_could_begin_one(text: str, stop: list[str]) -> None:
    matcher = StopStrings(stop)
    shown = ""
    for index, character in enumerate(text):
        shown += matcher.push(character)
        if matcher.found is not None:
            return
        seen = text[: index + 1]
        begun = [size for pattern in stop for size in range(len(pattern)) if seen.endswith(pattern[:size])]
        assert len(seen) - len(shown) == max(begun, default=0)


@pytest.mark.parametrize("split", range(len("one STOP two") + 1))
def test_every_split(split: int) -> None:
    matcher = StopStrings(["STOP"])
    text = "one STOP two"
    assert matcher.push(text[:split]) + matcher.push(text[split:]) + matcher.finish() == "one "
    assert matcher.found == "STOP"
    assert matcher.push("more") == ""


def test_what_looked_like_one_is_shown_in_the_end() -> None:
    matcher = StopStrings(["</answer>"])
    assert matcher.push("x </ans") == "x "
    assert matcher.push("?") == "</ans?"
    assert matcher.push("</") == ""
    assert matcher.finish() == "</"


def test_the_longest_of_those_that_end_together() -> None:
    matcher = StopStrings(["b", "ab"])
    assert matcher.push("xab") == "x"
    assert matcher.found == "ab"


def test_the_one_that_ends_first() -> None:
    matcher = StopStrings(["abcd", "bc"])
    assert matcher.push("abcd") == "a"
    assert matcher.found == "bc"
