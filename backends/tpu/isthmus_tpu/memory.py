"""The memory of torch_tpu's device."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from isthmus.reference.memory import host_available_bytes, host_total_bytes
from isthmus_static.memory import StaticMemory
from isthmus_tpu import sdk


class TpuMemory(StaticMemory):
    """:class:`isthmus.contract.Memory`.

    The runtime's own figures where it has them; else the chip's size by its kind, less what the tensors
    of this process hold.  A program's temporary memory is in neither: it has to fit into what the cache's
    share of the memory leaves.  ``host`` is a client that computes in the host's memory.
    """

    def __init__(self, device: torch.device, *, host: bool) -> None:
        super().__init__(device)
        self._host = host

    def available_bytes(self) -> int:
        if self._host:
            return host_available_bytes()
        told = self._told()
        return told[0] if told else max(0, self.total_bytes() - held_bytes(self.device.type))

    def total_bytes(self) -> int:
        if self._host:
            return host_total_bytes()
        told = self._told()
        return told[1] if told else sdk.total_memory() or 0

    def synchronize(self) -> None:
        torch.accelerator.synchronize()

    def _told(self) -> tuple[int, int] | None:
        """Free bytes and all, by the runtime; it says 0 of 0 where it does not know."""
        try:
            free, total = torch.accelerator.get_memory_info(self.device)
        except (AttributeError, RuntimeError):  # torch of before 2.10, or a client without figures
            return None
        return (free, total) if total else None


def held_bytes(device_type: str) -> int:
    """Bytes of the storages that Python's tensors on devices of this type hold."""
    storages = {}
    for found in gc.get_objects():
        # By its type: what only passes for a tensor must not be asked anything.
        if issubclass(type(found), Tensor) and found.device.type == device_type:
            storage = found.untyped_storage()
            if storage.device.type == device_type:  # and not "meta", as of the fake tensors that a compiler traced with
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
