"""How much one rendering of a template may take, and the count of what it took."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import jinja2

CONTAINERS: Final[tuple[type[Collection[Any]], ...]] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    deadline_s: float = 2.0
    """Of this thread's own running: a busy machine refuses nothing that a quiet one renders."""
    steps: int = 1_000_000
    """Turns of loops, and calls of macros, filters, tests and methods."""
    text: int = 1 << 23
    """Characters in any one string, the result included; also those of a nested value written out."""
    items: int = 1 << 20
    """Items of any one list."""
    work: int = 1 << 28
    """Characters and items made on the way, all together: bounds the memory taken."""


class LimitReached(jinja2.TemplateError):
    """A rendering took more than its share."""


class RenderBudget:
    """One rendering's account.  Not to be shared between threads."""

    __slots__ = ("_begun_cpu_s", "_limits", "_look_s", "_steps", "_weights", "_work")

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._begun_cpu_s = time.thread_time()
        self._look_s = time.monotonic() + limits.deadline_s  # the processor's time is dear to ask for
        self._steps = 0
        self._work = 0
        self._weights: dict[int, tuple[int, Any]] = {}

    def step(self) -> None:
        """Count a step; raises :class:`LimitReached` when there are no more, or no more time."""
        self._steps += 1
        if self._steps > self._limits.steps:
            raise self._exhausted()
        if time.monotonic() > self._look_s:
            left_s = self._limits.deadline_s - (time.thread_time() - self._begun_cpu_s)
            if left_s <= 0:
                raise self._exhausted()
            self._look_s = time.monotonic() + left_s

    def expect(self, size: int) -> None:
        """Refuse a text or list of this many characters or items before it is made."""
        if size > self._limits.text:
            raise LimitReached(f"it makes a text or list of {size}; at most {self._limits.text} are allowed")

    def pay(self, value: Any) -> None:
        """Count a step that made ``value``."""
        self.step()
        if isinstance(value, str | bytes):
            size = len(value)
        elif isinstance(value, CONTAINERS):
            size = len(value)
            if size > self._limits.items:
                raise LimitReached(f"it makes a list of {size} items; at most {self._limits.items} are allowed")
            self.expect(self._weigh(value))
        else:
            return
        self.expect(size)
        self._work += size
        if self._work > self._limits.work:
            raise self._exhausted()

    def _weigh(self, value: Any) -> int:
        """Characters and items of ``value`` written out.

        A list that holds one list twice holds its items twice, and so on: a value of forty small
        lists can take a terabyte to print, and forever to compare.
        """
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, CONTAINERS):
            return 1
        known = self._weights.get(id(value))
        if known is None:
            items = [*value, *value.values()] if isinstance(value, dict) else value
            # The value is kept, so that its id stays its own.
            known = (len(value) + 1 + sum(map(self._weigh, items)), value)
            self._weights[id(value)] = known
        return known[0]

    def _exhausted(self) -> LimitReached:
        limits = self._limits
        return LimitReached(
            f"it took more than {limits.deadline_s:g} s, {limits.steps} steps or {limits.work} characters to render; "
            "shorten the conversation or use another template"
        )
