"""``torch.<name>``: the functions that device modules have in common."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fake_device.device import FakeDevice


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """``total_memory`` in bytes."""

    name: str
    total_memory: int


def device_module(device: FakeDevice, provides: Sequence[str] | None) -> types.ModuleType:
    """A module with those of :class:`DeviceFunctions` that are in ``provides``, or all; ``fake_device`` is the device.

    What PyTorch itself calls (seeding, RNG state, ``_is_in_bad_fork``) is always there.
    """
    functions = DeviceFunctions(device)
    asked = [name for name in dir(functions) if not name.startswith("_")] if provides is None else provides
    module = types.ModuleType(f"torch.{device.name}")
    module.__dict__.update(_called_by_torch())
    module.__dict__.update({name: getattr(functions, name) for name in asked})
    module.__dict__["fake_device"] = device
    return module


def _called_by_torch() -> dict[str, Callable[..., Any]]:
    """The device's random numbers are the CPU's, so that is whose state they are."""
    return {
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": lambda: 0,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float32, torch.float16, torch.bfloat16],
    }


class DeviceFunctions:
    """The functions of ``torch.<name>``.  There is one device, so a device argument changes nothing."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def device_count(self) -> int:
        return self._device.count

    def is_available(self) -> bool:
        return self._device.count > 0

    def set_device(self, device: Any) -> None:
        index = torch.device(device).index if isinstance(device, str) else getattr(device, "index", device)
        if index not in (None, 0):
            raise ValueError(f"there is one {self._device.name} device, of index 0; {device} was asked for")

    def synchronize(self, device: Any = None) -> None:
        self._device.synchronize()

    def get_device_name(self, device: Any = None) -> str:
        return self._device.kind

    def get_device_properties(self, device: Any = None) -> DeviceProperties:
        return DeviceProperties(self._device.kind, self._device.total_memory)

    def memory_allocated(self, device: Any = None) -> int:
        return self._device.allocated_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._device.peak_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._device.reset_peak()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self._device.total_memory - self._device.allocated_bytes, self._device.total_memory

    def empty_cache(self) -> None:
        """Nothing is cached."""
