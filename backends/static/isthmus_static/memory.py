"""Memory of a device that torch knows by a name of its own, and copies of it to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.contract import Pending
from isthmus.reference.memory import ReferenceMemory


class _Arriving:
    """Tensors nobody else writes, copied when they are asked for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def result(self) -> Sequence[Any]:
        return [tensor.cpu().numpy() for tensor in self._tensors]


class StaticMemory(ReferenceMemory):
    """:class:`isthmus.contract.Memory` of a device with a queue of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        # Later steps may write the same memory: what is fetched is what stands there now.
        return _Arriving([tensor.clone() for tensor in tensors])
