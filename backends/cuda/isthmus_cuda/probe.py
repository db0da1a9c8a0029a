"""Finding devices without a CUDA SDK: the driver's own management library, through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendUnavailable

LIBRARY: Final = "libnvidia-ml.so.1"
NAME_BYTES: Final = 96
DEVICE_NODES: Final = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
"""One of these exists wherever the driver is loaded; the last under WSL."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True, slots=True)
class _Seen:
    name: str
    memory_bytes: int
    uuid: str


def probe_devices() -> list[DeviceInfo]:
    """Devices that this process may use, in the order in which CUDA numbers them.

    Raises :class:`BackendUnavailable` where devices are there and what runs them is not installed.
    """
    if not any(Path(node).exists() for node in DEVICE_NODES):
        return []
    seen = _visible(_ask_driver(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if seen:
        _require_packages()
    return [
        DeviceInfo(
            backend="cuda",
            index=index,
            name=device.name,
            memory_bytes=device.memory_bytes,
            details=(("uuid", device.uuid),),
        )
        for index, device in enumerate(seen)
    ]


def _require_packages() -> None:
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise BackendUnavailable(f"the cuda backend needs {package}; try: pip install 'isthmus-engine[cuda]'")


def _ask_driver() -> list[_Seen]:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BackendUnavailable(
            f"there is a CUDA device node, but the driver's library {LIBRARY} cannot be loaded ({error}); "
            f"install the driver, or give the container access to it"
        ) from error
    if (status := library.nvmlInit_v2()) != 0:
        raise BackendUnavailable(f"the CUDA driver does not answer (NVML status {status}); see what nvidia-smi says")
    try:
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        return [_describe(library, index) for index in range(count.value)]
    finally:
        library.nvmlShutdown()


def _describe(library: ctypes.CDLL, index: int) -> _Seen:
    handle = ctypes.c_void_p()
    library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    name, uuid = (ctypes.create_string_buffer(NAME_BYTES) for _ in range(2))
    library.nvmlDeviceGetName(handle, name, NAME_BYTES)
    library.nvmlDeviceGetUUID(handle, uuid, NAME_BYTES)
    memory = _Memory()
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return _Seen(name.value.decode(), memory.total, uuid.value.decode())


def _visible(devices: list[_Seen], wanted: str | None) -> list[_Seen]:
    """What ``CUDA_VISIBLE_DEVICES`` leaves, in its order; as CUDA does, up to the first entry unknown here."""
    if wanted is None:
        return devices
    chosen = []
    for entry in filter(None, (part.strip() for part in wanted.split(","))):
        if entry.isdigit():
            matching = devices[int(entry) : int(entry) + 1]
        else:
            matching = [device for device in devices if device.uuid.startswith(entry)]
        if len(matching) != 1:
            break
        chosen += matching
    return chosen
