"""Order of steps, copies to the host beside the steps, and memory figures, through ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from isthmus.contract import Pending
from isthmus.reference.memory import Done

T = TypeVar("T")


class _Fetched:
    """Arrays on their way to pinned memory."""

    def __init__(self, arrays: list[Tensor], arrived: torch.cuda.Event) -> None:
        self._arrays = arrays
        self._arrived = arrived

    def result(self) -> Sequence[Any]:
        self._arrived.synchronize()
        return [array.numpy() for array in self._arrays]


class StreamMemory:
    """:class:`isthmus.contract.Memory`.

    A step only queues work, so :meth:`launch` runs it on the calling thread.  :meth:`fetch` copies on
    the steps' own stream (a few hundred bytes, ahead of the next step's first kernel), into pinned
    memory that torch does not hand out again before the copy has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    def available_bytes(self) -> int:
        """Free on the device, and what torch's allocator holds without using it."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[1])

    def launch(self, step: Callable[[], T]) -> Pending[T]:
        try:
            return Done(step())
        except Exception as error:
            return Done(error=error)

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        arrays = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for array, tensor in zip(arrays, tensors, strict=True):
            array.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Fetched(arrays, arrived)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)
