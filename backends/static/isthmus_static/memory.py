"""Memory of a device that torch knows by a name of its own, and copies of it to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.contract import Pending
from isthmus.reference.memory import ReferenceMemory


class Arriving:
    """Tensors nobody else writes, copied when they are asked for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def result(self) -> Sequence[Any]:
        return [tensor.cpu().numpy() for tensor in self._tensors]


class _Underway:
    """Copies that the device makes by itself; there once ``event`` has passed."""

    def __init__(self, tensors: Sequence[Tensor], event: Any) -> None:
        self._tensors = tensors
        self._event = event

    def result(self) -> Sequence[Any]:
        self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


class StaticMemory(ReferenceMemory):
    """:class:`isthmus.contract.Memory` of a device with a queue of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        # Later steps may write the same memory: what is fetched is what stands there now.
        return Arriving([tensor.clone() for tensor in tensors])


class EventMemory(StaticMemory):
    """:class:`StaticMemory` of a device whose module has ``Event`` and a ``synchronize`` that takes no device.

    The stream runs in order: a copy put there right after its step is done before the next step ends, where one
    put there when the host asks would wait for every step launched by then.
    """

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        arriving = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        event = torch.get_device_module(self.device).Event()
        event.record()
        return _Underway(arriving, event)

    def synchronize(self) -> None:
        torch.get_device_module(self.device).synchronize()
