"""A step while it is being planned, and once it is on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.cache import TableEdits
from isthmus.plan import Int32Array, RowStart, StepPlan


@dataclass(slots=True)
class Draft:
    """Spans, table edits and row starts found so far, and the tokens left to give."""

    budget: int
    rows: list[Int32Array] = field(default_factory=list)
    lengths: list[Int32Array] = field(default_factory=list)
    edits: list[TableEdits] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)
    preempted: bool = False

    def add(self, rows: Int32Array, lengths: Int32Array, edits: TableEdits) -> None:
        self.rows.append(rows)
        self.lengths.append(lengths)
        self.edits.append(edits)
        self.budget -= int(lengths.sum())

    def joined_spans(self) -> tuple[Int32Array, Int32Array]:
        """Rows and lengths of all spans."""
        if len(self.rows) == 1:
            return self.rows[0], self.lengths[0]
        return np.concatenate(self.rows), np.concatenate(self.lengths)

    def joined_edits(self) -> TableEdits:
        if len(self.edits) == 1:
            return self.edits[0]
        return TableEdits(*(np.concatenate(columns) for columns in zip(*self.edits, strict=True)))


@dataclass(frozen=True, slots=True)
class Flight:
    """A planned step whose result is not in, and whom its spans belong to."""

    plan: StepPlan
    owners: NDArray[Any]  # [spans] sequences
    rows: Int32Array  # [samples]
    serials: NDArray[np.int64]  # [samples] of the stays that sampled
