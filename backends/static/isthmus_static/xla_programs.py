"""The static library on devices of torch_xla: programs without Dynamo, and memory as its runtime tells it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.reference.memory import host_available_bytes, host_total_bytes
from isthmus_static import xla
from isthmus_static.memory import StaticMemory
from isthmus_static.programs import Compiled, Programs

T = TypeVar("T")


class XlaPrograms(Programs):
    """:class:`Programs` through :func:`isthmus_static.xla.compile_step`.

    It is the program that torch.compile makes with ``openxla``, from one run of a step's Python in
    the place of three traces.  torch_xla is told what may be written in place, because it would
    copy whole caches otherwise.
    """

    def __init__(self) -> None:
        super().__init__("openxla")
        self._latest: dict[str, list[weakref.ref[Tensor]]] = {}
        self._kept: list[weakref.ref[Tensor]] = []

    def keeps(self, name: str, tensors: Sequence[Tensor]) -> None:
        self._latest[name] = [weakref.ref(tensor) for tensor in tensors]
        self._kept = [ref for ref in self._kept if ref() is not None] + self._latest[name]

    def _compile(
        self, name: str, step: Callable[[], T], tensors: Sequence[Tensor] | None = None
    ) -> tuple[Compiled[T], T]:
        assert self._feed is not None, "inputs are allocated before anything is compiled"
        if tensors is None:
            inputs = [self._feed.ints, self._feed.floats]
            state = _alive([ref for refs in self._latest.values() for ref in refs])
        else:
            kept = {id(tensor) for tensor in _alive(self._kept)}
            inputs = [tensor for tensor in tensors if id(tensor) not in kept]
            state = [tensor for tensor in tensors if id(tensor) in kept]
        began = time.perf_counter()
        run, arguments, outputs, result = xla.compile_step(step, inputs, state)
        self._count(name, time.perf_counter() - began)
        return Compiled(run, arguments, outputs, result), result


def _alive(refs: Sequence[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for tensor in (ref() for ref in refs) if tensor is not None]


class XlaMemory(StaticMemory):
    """:class:`isthmus.contract.Memory` of a device of torch_xla; of the host where the platform is a CPU.

    The clones that it fetches are no programs: torch_xla lets a clone share its tensor's buffer until either is
    written.  A program that writes a tensor in place does not know of that: state is not to be fetched.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)

    def available_bytes(self) -> int:
        used = xla.memory_bytes(self.device)
        return host_available_bytes() if used is None else used[1] - used[0]

    def total_bytes(self) -> int:
        used = xla.memory_bytes(self.device)
        return host_total_bytes() if used is None else used[1]

    def synchronize(self) -> None:
        xla.wait()
