"""The device as tests see it: installed under a vendor's name, counted, and told to fail."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch._dynamo import register_backend

from fake_device.build import library
from fake_device.compiler import Compiler
from fake_device.module import device_module
from fake_device.native import Native

GIB: Final = 2**30
TOTAL_MEMORY: Final = 8 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the device has done since :meth:`FakeDevice.reset_counters`.

    A copy is a transfer between host and device, ``item()`` included; copies inside the device are ops.  ``eager_ops``
    are the operators that ran outside of any compiled graph, by name (``"aten::add"``); views and allocations are
    neither.  A replayed graph's operators are in ``graph_ops``.
    """

    graphs_compiled: int
    graph_runs: int
    device_to_host: int
    device_to_host_bytes: int
    host_to_device: int
    host_to_device_bytes: int
    allocations: int
    synchronizations: int
    eager_ops: dict[str, int]
    graph_ops: dict[str, int]


class FakeDevice:
    """The process's one fake device.

    ``total_memory`` bytes may be allocated at once; the accounts are exact, of the bytes that storages hold, with
    neither rounding nor a cache.  What a compiled graph allocates while it runs is counted as it would be eagerly.
    """

    def __init__(self, name: str, *, kind: str, count: int, total_memory: int, native: Native) -> None:
        self.name = name
        self.kind = kind
        self.count = count
        self.compiler = Compiler(name, native)
        self._native = native
        self._synchronizations = 0
        self.total_memory = total_memory

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.name, 0)

    @property
    def total_memory(self) -> int:
        return self._native.read()["limit"]

    @total_memory.setter
    def total_memory(self, num_bytes: int) -> None:
        """An allocation that does not fit from now on raises :class:`torch.OutOfMemoryError`."""
        self._native.set_limit(num_bytes)

    @property
    def allocated_bytes(self) -> int:
        return self._native.read()["in_use"]

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated at once since :meth:`reset_peak`."""
        return self._native.read()["peak"]

    def reset_peak(self) -> None:
        self._native.reset_peak()

    def fail_next_allocation_over(self, num_bytes: int) -> None:
        """The next allocation of more than ``num_bytes`` raises :class:`torch.OutOfMemoryError`; later ones succeed."""
        self._native.fail_next_over(num_bytes)

    def cancel_failure(self) -> None:
        """Forgets :meth:`fail_next_allocation_over` that has not come to pass."""
        self._native.fail_next_over(-1)

    def counters(self) -> Counters:
        read = self._native.read()
        return Counters(
            graphs_compiled=len(self.compiler.graphs),
            graph_runs=self.compiler.runs,
            device_to_host=read["to_host"],
            device_to_host_bytes=read["to_host_bytes"],
            host_to_device=read["from_host"],
            host_to_device_bytes=read["from_host_bytes"],
            allocations=read["allocations"],
            synchronizations=self._synchronizations,
            eager_ops=self._native.ops(in_graphs=False),
            graph_ops=self._native.ops(in_graphs=True),
        )

    def reset_counters(self) -> None:
        """Also forgets which graphs were compiled; they stay usable."""
        self._native.reset_counts()
        self.compiler.reset()
        self._synchronizations = 0

    @contextmanager
    def in_graph(self) -> Iterator[None]:
        """What runs inside is held to the rules of a compiled graph, as a captured one would be."""
        self._native.enter_graph()
        try:
            yield
        finally:
            self._native.leave_graph()

    def synchronize(self) -> None:
        if self._native.is_in_graph():
            raise RuntimeError(f"{self.name}: synchronize() inside a compiled graph")
        self._synchronizations += 1


def install(
    name: str,
    *,
    backends: Sequence[str] = (),
    kind: str = "",
    provides: Sequence[str] | None = None,
) -> FakeDevice:
    """Makes ``torch.device(name)`` and ``torch.<name>`` this device, and ``backends`` its Dynamo backends.

    ``backends`` is ``(name,)`` unless given; ``kind`` is what the device calls itself.  ``provides`` names those of
    :class:`~fake_device.module.DeviceFunctions` that ``torch.<name>`` has, where a vendor's lacks some; None is all.
    ``FAKE_DEVICE_MEMORY`` (bytes, 8 GiB unless set) and ``FAKE_DEVICE_COUNT`` (1; 0 is an SDK without its device)
    come from the environment, for servers that a test starts.

    A second call with the same name returns the same device; with another name it raises :class:`RuntimeError`, for
    PyTorch renames its backend once a process.
    """
    known = installed()
    if known is not None:
        if known.name != name:
            raise RuntimeError(f"the fake device is {known.name} in this process and cannot become {name}")
        return known
    torch.utils.rename_privateuse1_backend(name)
    device = FakeDevice(
        name,
        kind=kind or name.upper(),
        count=int(os.environ.get("FAKE_DEVICE_COUNT", "1")),
        total_memory=int(os.environ.get("FAKE_DEVICE_MEMORY", str(TOTAL_MEMORY))),
        native=Native(library()),
    )
    torch._register_device_module(name, device_module(device, provides))
    torch.utils.generate_methods_for_privateuse1_backend()
    for backend in backends or (name,):
        register_backend(device.compiler, name=backend)
    return device


def installed() -> FakeDevice | None:
    """The fake device of this process; None where none was installed."""
    module = getattr(torch, torch._C._get_privateuse1_backend_name(), None)
    device = getattr(module, "fake_device", None)
    return device if isinstance(device, FakeDevice) else None
