"""What is taken is given back: by each executor, and by the device when it closes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.executor.build import resident_bytes
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import Arrangement, Engine
from isthmus.testing.tiny_model import write_tiny_model

MIB = 2**20
LEAK_BYTES = 24 * MIB
DEVICE_LEAK_BYTES = 8 * MIB
"""Of a device's own memory, which nothing else allocates from by the way."""


@pytest.mark.mandatory
def test_an_executor_gives_its_memory_back(isthmus_device: DeviceUnderTest, tmp_path: Path) -> None:
    """Weights of some 9 MB at least and a cache, built and closed again and again.

    An allocator may keep a reserve, which goes up and down; a leak only goes up.
    """
    folder = write_tiny_model(tmp_path, hidden_size=512, intermediate_size=1024)
    how = Arrangement(dtype=isthmus_device.capabilities.dtypes[0])

    def life() -> int:
        engine = Engine(isthmus_device.backend, isthmus_device.model or str(folder), how)
        engine.run([[1, 2, 3]])
        engine.close()
        del engine
        gc.collect()
        return taken(isthmus_device)

    lives = [life() for _ in range(18)]
    growth = min(lives[10:]) - max(lives[:2])
    sizes = [round(taken / MIB) for taken in lives]
    most = LEAK_BYTES if in_host_memory(isthmus_device) else DEVICE_LEAK_BYTES
    assert growth < most, f"executors leave memory behind; taken after each, in MiB: {sizes}"


def in_host_memory(device: DeviceUnderTest) -> bool:
    return not device.has_parts or device.capabilities.unified_memory or device.parts.memory.device.type == "cpu"


def taken(device: DeviceUnderTest) -> int:
    if in_host_memory(device):
        return resident_bytes()
    memory = device.parts.memory
    memory.synchronize()
    return memory.total_bytes() - memory.available_bytes()


@pytest.mark.mandatory
@pytest.mark.closes_device
def test_the_device_closes(isthmus_device: DeviceUnderTest) -> None:
    isthmus_device.close()
    left = within(5.0, lambda: stray_threads(isthmus_device))
    assert not left, f"threads still run after close: {', '.join(left)}"


def stray_threads(device: DeviceUnderTest) -> list[str]:
    """Threads begun since the device was opened that would keep the process alive."""
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.ident not in device.threads_before and not thread.daemon and thread is not threading.current_thread()
    ]


def within(deadline_s: float, look: Callable[[], list[str]]) -> list[str]:
    until = time.monotonic() + deadline_s
    while (found := look()) and time.monotonic() < until:
        time.sleep(0.05)
    return found
