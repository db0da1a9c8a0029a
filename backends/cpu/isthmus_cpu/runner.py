"""Runs operations at once, or records them while a graph is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import torch
from torch import Tensor

from isthmus.errors import Unsupported
from isthmus_cpu.library import Kind, Op, Pool, Rows, make_op
from isthmus_cpu.pages import large_pages

Pointer: TypeAlias = Tensor | None

LIGHT: Final = frozenset({Kind.RMS_NORM, Kind.ADD_RMS_NORM, Kind.ADD, Kind.TAKE_ROWS, Kind.PLAN_ATTENTION, Kind.ARGMAX})
"""Operations that read each element about once."""
LIGHT_ELEMENTS: Final = 1 << 16
"""As many as one thread goes through in the time in which another wakes."""


@dataclass(slots=True)
class Allocation:
    """Memory that a traced operation asked for.  Never written while tracing, so never really taken."""

    tensor: Tensor
    rows: Rows

    @property
    def address(self) -> int:
        return self.tensor.untyped_storage().data_ptr()

    @property
    def nbytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()


@dataclass(slots=True)
class Record:
    """One traced operation; ``pointers`` keeps alive what it reads and writes."""

    op: Op
    pointers: tuple[Pointer, ...]


@dataclass(slots=True)
class Trace:
    """What a step did: its operations in order, and the memory between them."""

    inputs: dict[int, Rows]
    """Addresses of a step's inputs, whose contents and number of rows change from run to run."""
    records: list[Record] = field(default_factory=list)
    allocations: dict[int, Allocation] = field(default_factory=dict)

    def rows_of(self, tensor: Tensor) -> Rows:
        """Which count of a step is the first dimension of ``tensor``."""
        address = tensor.untyped_storage().data_ptr()
        if address in self.allocations:
            return self.allocations[address].rows
        if tensor.data_ptr() in self.inputs:
            return self.inputs[tensor.data_ptr()]
        raise Unsupported("a captured step may use no tensor but its inputs and what operations made of them")


class Runner:
    """Where all operations of a backend go."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._large = torch.empty(0, dtype=torch.float32)
        self.trace: Trace | None = None
        """Set while a graph is captured: operations are recorded and not run."""

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """float32 memory for a result whose rows are those of ``like``."""
        made = torch.empty(shape, dtype=torch.float32)
        if self.trace is not None:
            allocation = Allocation(made, self.trace.rows_of(like))
            self.trace.allocations[allocation.address] = allocation
        return made

    def reused(self, like: Tensor, rows: int, width: int) -> Tensor:
        """As :meth:`empty`, but the same memory each time, so that its pages stay: for large results."""
        if self.trace is not None:
            return self.empty(like, rows, width)
        if self._large.numel() < rows * width:
            self._large = large_pages(rows * width * 4).view(torch.float32)
        return self._large[: rows * width].view(rows, width)

    def run(
        self,
        kind: Kind,
        like: Tensor,
        pointers: tuple[Pointer, ...],
        integers: Sequence[int] = (),
        floats: Sequence[float] = (),
        *,
        rows: int | None = None,
        rows_from: Rows | None = None,
    ) -> None:
        """Run over the rows of ``like``, or over ``rows`` of them, which a captured run takes from ``rows_from``."""
        addresses = [0 if pointer is None else pointer.data_ptr() for pointer in pointers]
        count = like.shape[0] if rows is None else rows
        if self.trace is None:
            alone = kind in LIGHT and like.numel() <= LIGHT_ELEMENTS
            self._pool.run(make_op(kind, count, addresses, integers, floats), alone=alone)
            return
        source = self.trace.rows_of(like) if rows_from is None else rows_from
        self.trace.records.append(Record(make_op(kind, count, addresses, integers, floats, source), pointers))
