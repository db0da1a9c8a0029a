"""The device's memory, and results on their way to the host while the next step runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.contract import Pending
from isthmus_static.memory import StaticMemory


class _Arriving:
    def __init__(self, tensors: Sequence[Tensor], event: Any) -> None:
        self._tensors = tensors
        self._event = event

    def result(self) -> Sequence[Any]:
        self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


class HpuMemory(StaticMemory):
    """:class:`isthmus.contract.Memory`.

    The stream runs in order: a copy put there right after its step is done before the next step ends, where one
    put there when the host asks would wait for every step launched by then.
    """

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        arriving = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        event = torch.get_device_module(self.device).Event()
        event.record()
        return _Arriving(arriving, event)

    def synchronize(self) -> None:
        torch.get_device_module(self.device).synchronize()  # the bridge's takes no device
