"""Neighbours on a tape that one kernel can do together, with the same result to the last bit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from isthmus_cpu.library import Epilogue, Kind
from isthmus_cpu.runner import Record


def fuse(records: Sequence[Record], kept: Collection[int], panel: int) -> list[Record]:
    """A linear and the gate after it; a linear and the sum after it.

    ``kept`` holds the addresses of what is read after the tape: it has to be written.
    """
    readers = _readers(records)
    fused: list[Record] = []
    skip = False
    for record, following in zip(records, [*records[1:], None], strict=True):
        if skip:
            skip = False
            continue
        made = None if following is None else _gated(record, following, kept, panel, readers)
        skip = made is not None
        fused.append(made or record)
    return fused


def _gated(linear: Record, gate: Record, kept: Collection[int], panel: int, readers: dict[int, int]) -> Record | None:
    """``gate(linear(x))`` where nothing else reads what the linear makes."""
    if linear.op.kind != Kind.LINEAR or gate.op.kind != Kind.GATED or linear.op.i[3] != Epilogue.NONE:
        return None
    between = linear.op.p[3]
    inner = gate.op.i[0]
    if gate.op.p[0] != between or between in kept or readers[between] != 2 or inner % panel != 0:
        return None
    x, packed, bias, _ = linear.pointers
    op = type(linear.op).from_buffer_copy(linear.op)
    op.p[3] = gate.op.p[1]
    op.i[3] = gate.op.i[1]
    op.i[5] = inner
    return Record(op, (x, packed, bias, gate.pointers[1]))


def _readers(records: Sequence[Record]) -> dict[int, int]:
    """How many operations name each address, the one that writes it included."""
    counts: dict[int, int] = {}
    for record in records:
        for address in {pointer.data_ptr() for pointer in record.pointers if pointer is not None}:
            counts[address] = counts.get(address, 0) + 1
    return counts
