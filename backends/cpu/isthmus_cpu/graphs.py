"""Captured steps: one list of operations over one arena, run by one call for any number of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from isthmus.errors import Unsupported
from isthmus_cpu.arena import Life, place
from isthmus_cpu.fusion import fuse
from isthmus_cpu.inputs import PanelInputs
from isthmus_cpu.library import Op, Pool
from isthmus_cpu.pages import large_pages
from isthmus_cpu.runner import Record, Runner, Trace

T = TypeVar("T")

READS: Final = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose"}
)
"""What looks at values, which there are none of while tracing."""
WRITES: Final = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})


class Tape(Generic[T]):
    """:class:`isthmus.contract.CapturedGraph`: operations whose numbers of rows are the current step's."""

    def __init__(self, pool: Pool, ops: ctypes.Array[Op], inputs: PanelInputs, kept: list[Any], output: T) -> None:
        self._output = output
        self._pool = pool
        self._ops = ops
        self._inputs = inputs
        self._kept = kept

    def __len__(self) -> int:
        return len(self._ops)

    def replay(self, num_tokens: int) -> T:
        self._inputs.counts.tokens = num_tokens
        self._pool.run(self._ops, len(self._ops), self._inputs.counts)
        return self._output


class TapeGraphs:
    """:class:`isthmus.contract.Graphs` of compiled kernels.

    A step is traced without computing, so that its output holds nothing before the first replay.  What
    it would have allocated is then laid out in one arena, memory being used again as soon as nothing
    reads it any more.
    """

    def __init__(self, pool: Pool, runner: Runner, inputs: PanelInputs, panel: int) -> None:
        self._pool = pool
        self._runner = runner
        self._inputs = inputs
        self._panel = panel

    def capture(self, step: Callable[[], T], num_tokens: int) -> Tape[T]:
        trace = Trace(self._inputs.row_counts())
        self._runner.trace = trace
        try:
            with OnlyViews():
                output = step()
        finally:
            self._runner.trace = None
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        return self._finish(trace, outputs, output)

    def _finish(self, trace: Trace, outputs: list[Tensor], output: T) -> Tape[T]:
        for tensor in outputs:
            trace.rows_of(tensor)  # raises for a tensor that no operation made
        kept = {tensor.untyped_storage().data_ptr() for tensor in outputs}
        records = fuse(trace.records, kept, self._panel)
        lives = _lives(trace, records, kept)
        offsets, total = place(list(lives.values()))
        arena = large_pages(total)
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
        return Tape(self._pool, ops, self._inputs, constants, output)


class OnlyViews(TorchFunctionMode):
    """Raises :class:`Unsupported` for torch arithmetic: a trace would not see it.

    Not a dispatch mode, because the first of those in a process imports torch's compiler, which takes
    longer than loading a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if func is torch.empty:
            return func(*args, **(kwargs or {}))
        if name in READS or (name.endswith("_") and not name.endswith("__")) or name in WRITES:
            raise Unsupported(f"a captured step may not call torch's {name}: the trace would not see it")
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor | tuple | list):
            return result
        given = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                raise Unsupported(f"a captured step may not call torch's {name}: the trace would not see it")
        return result


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
