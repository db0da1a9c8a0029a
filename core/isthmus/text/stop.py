"""Finding stop strings in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence


class _Automaton:
    """One stop string matched a character at a time (Knuth, Morris, Pratt)."""

    __slots__ = ("_failure", "matched", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        """How long a beginning of the pattern the text so far ends with."""
        self._failure = [0] * len(pattern)
        length = 0
        for index in range(1, len(pattern)):
            while length and pattern[index] != pattern[length]:
                length = self._failure[length - 1]
            length += pattern[index] == pattern[length]
            self._failure[index] = length

    def step(self, character: str) -> bool:
        """Whether the pattern ends with this character.  Not to be called again once it did."""
        pattern, matched = self.pattern, self.matched
        while matched and pattern[matched] != character:
            matched = self._failure[matched - 1]
        self.matched = matched + (pattern[matched] == character)
        return self.matched == len(pattern)


class StopStrings:
    """Cuts one sequence's text at the first stop string, however the text is divided into pieces.

    The match that ends first wins; of several that end together, the longest.  What has been
    returned never holds any part of a match, and no more is kept back than could begin one.
    """

    __slots__ = ("_automata", "_beginnings", "_held", "_include", "found")

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._automata = [_Automaton(pattern) for pattern in stop]
        self._beginnings = re.compile("|".join(re.escape(pattern[0]) for pattern in stop)) if stop else None
        self._include = include_in_output
        self._held = ""
        self.found: str | None = None
        """The stop string that was met; the text is over then."""

    def push(self, text: str) -> str:
        """The text that can be shown now.  After a match, nothing more."""
        if self.found is not None:
            return ""
        if self._beginnings is None or (not self._held and self._beginnings.search(text) is None):
            return text
        whole = self._held + text
        for index in range(len(self._held), len(whole)):
            character = whole[index]
            met = [automaton for automaton in self._automata if automaton.step(character)]
            if met:
                self.found = max((automaton.pattern for automaton in met), key=len)
                self._held = ""
                return whole[: index + 1] if self._include else whole[: index + 1 - len(self.found)]
        keep = max(automaton.matched for automaton in self._automata)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def finish(self) -> str:
        """What was kept back, now that no more text comes."""
        held, self._held = self._held, ""
        return held
