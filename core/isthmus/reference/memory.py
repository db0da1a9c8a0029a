"""Order of steps, copies to the host and memory figures, on any torch device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from isthmus.contract import Pending

T = TypeVar("T")


class Done(Generic[T]):
    """The result of work that has been done, or what it raised."""

    def __init__(self, value: T | None = None, error: BaseException | None = None) -> None:
        self._value = value
        self._error = error

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # a T wherever there is no error


class ReferenceMemory:
    """:class:`isthmus.contract.Memory`.

    With ``asynchronous`` steps run on one worker thread, so that the caller of :meth:`launch` may
    go on while a device that computes on its calling thread (a CPU) works.
    """

    def __init__(self, device: torch.device, *, asynchronous: bool = False) -> None:
        self._device = device
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="isthmus-device") if asynchronous else None

    @property
    def device(self) -> torch.device:
        return self._device

    def available_bytes(self) -> int:
        if self._device.type == "cpu":
            return host_available_bytes()
        return int(torch.get_device_module(self._device).mem_get_info(self._device)[0])

    def total_bytes(self) -> int:
        if self._device.type == "cpu":
            return host_total_bytes()
        return int(torch.get_device_module(self._device).mem_get_info(self._device)[1])

    def launch(self, step: Callable[[], T]) -> Pending[T]:
        if self._worker is not None:
            return self._worker.submit(step)
        try:
            return Done(step())
        except Exception as error:
            return Done(error=error)

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        # A copy even from the host's own memory: the next step writes the same buffers.
        return Done([tensor.to("cpu", copy=True).numpy() for tensor in tensors])

    def synchronize(self) -> None:
        if self._worker is not None:
            self._worker.submit(lambda: None).result()
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)

    def close(self) -> None:
        """Wait for the steps launched, and end the worker."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)


def host_total_bytes() -> int:
    """Memory of this machine, or of the control group this process may not leave."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control_group("memory.max")
    return total if limit is None else min(total, limit)


def host_available_bytes() -> int:
    """Memory that may still be taken without swapping, page cache that can be dropped included."""
    available = _meminfo_available()
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used + _inactive_file()))
    return available


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
    pages = next((os.sysconf(name) for name in names if name in os.sysconf_names), 0)
    return os.sysconf("SC_PAGE_SIZE") * pages


def _control_group(name: str) -> int | None:
    """A number of this process's control group (version 2), or ``None`` where there is no limit."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / own, Path("/sys/fs/cgroup")):
            if (folder / name).exists():
                text = (folder / name).read_text().strip()
                return None if text == "max" else int(text)
    except (OSError, ValueError):
        pass
    return None


def _inactive_file() -> int:
    """File pages that the control group would drop before it refuses memory."""
    try:
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
