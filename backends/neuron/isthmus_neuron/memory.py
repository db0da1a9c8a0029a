"""A NeuronCore's memory, by each route, and results on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from isthmus.contract import Pending
from isthmus_neuron.hardware import Core
from isthmus_static import xla
from isthmus_static.memory import StaticMemory
from isthmus_static.xla_programs import XlaMemory


class _Arriving:
    def __init__(self, tensors: Sequence[Tensor], event: Any) -> None:
        self._tensors = tensors
        self._event = event

    def result(self) -> Sequence[Any]:
        self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


class NeuronMemory(StaticMemory):
    """:class:`isthmus.contract.Memory` of torch-neuronx's own device, which tells what is there and what is taken.

    The stream runs in order: a copy put there right after its step is done before the next step ends, where one
    put there when the host asks would wait for every step launched by then.
    """

    def __init__(self, device: torch.device, neuron: ModuleType) -> None:
        super().__init__(device)
        self._neuron = neuron

    def available_bytes(self) -> int:
        return self.total_bytes() - int(self._neuron.memory_allocated(self.device))

    def total_bytes(self) -> int:
        return int(self._neuron.get_device_properties(self.device).total_memory)

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        arriving = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        event = self._neuron.Event()
        event.record()
        return _Arriving(arriving, event)

    def synchronize(self) -> None:
        self._neuron.synchronize()


class NeuronXlaMemory(XlaMemory):
    """:class:`XlaMemory`, by the driver's figures where the runtime has none."""

    def __init__(self, device: torch.device, core: Core | None) -> None:
        super().__init__(device)
        self._core = core

    def available_bytes(self) -> int:
        if self._core is None or xla.memory_bytes(self.device) is not None:
            return super().available_bytes()
        return max(0, self._core.total_bytes - self._core.used_bytes())

    def total_bytes(self) -> int:
        if self._core is None or xla.memory_bytes(self.device) is not None:
            return super().total_bytes()
        return self._core.total_bytes
