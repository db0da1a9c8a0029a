"""Captured steps: one list of operations over one arena, run by one call for any number of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.contract import CapturedGraph
from isthmus.errors import Unsupported
from isthmus_cpu.arena import Life, place
from isthmus_cpu.fusion import fuse
from isthmus_cpu.inputs import PanelInputs
from isthmus_cpu.library import Op, Pool
from isthmus_cpu.runner import Record, Runner, Trace

T = TypeVar("T")


class Tape:
    """:class:`isthmus.contract.CapturedGraph`: operations whose numbers of rows are the current step's."""

    def __init__(self, pool: Pool, ops: ctypes.Array[Op], inputs: PanelInputs, kept: list[Any]) -> None:
        self._pool = pool
        self._ops = ops
        self._inputs = inputs
        self._kept = kept

    def __len__(self) -> int:
        return len(self._ops)

    def replay(self, num_tokens: int) -> None:
        self._inputs.counts.tokens = num_tokens
        self._pool.run(self._ops, len(self._ops), self._inputs.counts)


class TapeGraphs:
    """:class:`isthmus.contract.Graphs` of compiled kernels.

    A step is traced without computing; what it would have allocated is then laid out in one arena,
    memory being used again as soon as nothing reads it any more.
    """

    def __init__(self, pool: Pool, runner: Runner, inputs: PanelInputs, panel: int) -> None:
        self._pool = pool
        self._runner = runner
        self._inputs = inputs
        self._panel = panel

    def capture(self, step: Callable[[], T], num_tokens: int) -> tuple[CapturedGraph, T]:
        trace = Trace(self._inputs.row_counts())
        self._runner.trace = trace
        try:
            with OnlyViews():  # type: ignore[no-untyped-call]
                output = step()
        finally:
            self._runner.trace = None
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        tape = self._finish(trace, outputs)
        tape.replay(self._inputs.counts.tokens)
        return tape, output

    def _finish(self, trace: Trace, outputs: list[Tensor]) -> Tape:
        for tensor in outputs:
            trace.rows_of(tensor)  # raises for a tensor that no operation made
        kept = {tensor.untyped_storage().data_ptr() for tensor in outputs}
        records = fuse(trace.records, kept, self._panel)
        lives = _lives(trace, records, kept)
        offsets, total = place(list(lives.values()))
        arena = torch.empty(total, dtype=torch.uint8)
        moved = {address: arena.data_ptr() + offset - address for address, offset in zip(lives, offsets, strict=True)}
        ops = (Op * len(records))()
        constants: list[Any] = [arena, outputs]
        for number, record in enumerate(records):
            ops[number] = record.op
            for slot, pointer in enumerate(record.pointers):
                if pointer is None:
                    continue
                storage = pointer.untyped_storage().data_ptr()
                if storage in moved:
                    ops[number].p[slot] = pointer.data_ptr() + moved[storage]
                else:
                    constants.append(pointer)
        return Tape(self._pool, ops, self._inputs, constants)


class OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises :class:`Unsupported` for torch arithmetic: a trace would not see it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func is not torch.ops.aten.empty.memory_format:
            raise Unsupported(f"a captured step may not call torch's {func.name()}: the trace would not see it")
        return func(*args, **(kwargs or {}))


def _lives(trace: Trace, records: list[Record], kept: set[int]) -> dict[int, Life]:
    """By address: from the first operation that touches an allocation to the last one that does."""
    lives: dict[int, Life] = {}
    for number, record in enumerate(records):
        for pointer in record.pointers:
            address = 0 if pointer is None else pointer.untyped_storage().data_ptr()
            if address in trace.allocations and address not in kept:
                first = lives[address].first if address in lives else number
                lives[address] = Life(first, number, trace.allocations[address].nbytes)
    return lives
