"""A NeuronCore's memory, by each route."""

from __future__ import annotations

from types import ModuleType

import torch

from isthmus_neuron.hardware import Core
from isthmus_static import xla
from isthmus_static.memory import EventMemory
from isthmus_static.xla_programs import XlaMemory


class NeuronMemory(EventMemory):
    """:class:`isthmus.contract.Memory` of torch-neuronx's own device, which tells what is there and what is taken."""

    def __init__(self, device: torch.device, neuron: ModuleType) -> None:
        super().__init__(device)
        self._neuron = neuron

    def available_bytes(self) -> int:
        return self.total_bytes() - int(self._neuron.memory_allocated(self.device))

    def total_bytes(self) -> int:
        return int(self._neuron.get_device_properties(self.device).total_memory)


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
