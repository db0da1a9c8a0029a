"""Finding TPUs: torch_tpu counts them, and the PCI bus where torch_xla would take them by counting."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus_tpu import artefacts, hardware, sdk
from isthmus_tpu.sdk import Route, Sdk

REHEARSAL = "the host's processor, in a TPU's place"


def probe_devices(root: Path = Path("/")) -> list[DeviceInfo]:
    """One for each device that this process may use, none of them opened.

    Raises :class:`BackendUnavailable` where the software is missing, or finds no device.
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailable(f"the tpu backend needs torch; {sdk.INSTALL}")
    found = sdk.find()
    artefacts.configure(found, os.environ)
    return _torch_tpu_devices(found) if found.route is Route.TORCH_TPU else _torch_xla_devices(found, root)


def _torch_tpu_devices(found: Sdk) -> list[DeviceInfo]:
    if not sdk.load_torch_tpu():
        raise BackendUnavailable(
            f"torch_tpu {found.version} finds no TPU on this machine; give a container the devices /dev/vfio/*, and "
            f"do not set TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )
    name, memory = sdk.device_name(), sdk.total_memory()
    if memory is None:
        return [DeviceInfo(backend="tpu", index=0, name=REHEARSAL, host=True, auto=False)]
    indices = range(sdk.device_count())
    return [DeviceInfo(backend="tpu", index=index, name=f"Google {name}", memory_bytes=memory) for index in indices]


def _torch_xla_devices(found: Sdk, root: Path) -> list[DeviceInfo]:
    if found.rehearsal:
        return [DeviceInfo(backend="tpu", index=0, name=REHEARSAL, host=True, auto=False)]
    devices = hardware.devices(root)
    if not devices:
        raise BackendUnavailable(
            f"torch_xla {found.version} is installed and the PCI bus has no TPU; run on a TPU VM, and give a container "
            f"/sys and the devices /dev/vfio/* or /dev/accel*"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise BackendUnavailable(
            'torch_xla is installed without libtpu, the TPU\'s runtime; pip install "isthmus-engine[tpu-xla]" brings it'
        )
    return [
        DeviceInfo(backend="tpu", index=index, name=f"Google {device.name}", memory_bytes=device.memory_bytes)
        for index, device in enumerate(devices)
    ]
