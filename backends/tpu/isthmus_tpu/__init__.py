"""Google TPU: steps compiled in static shapes, by torch_tpu's own device or through torch_xla."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from isthmus.contract import Capabilities, DeviceInfo
from isthmus.hookspecs import hookimpl
from isthmus_tpu.capabilities import capabilities_of
from isthmus_tpu.probe import probe_devices

if TYPE_CHECKING:
    from isthmus.contract import Backend

CONTRACT_VERSION: Final = (1, 0)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return probe_devices()


@hookimpl
def isthmus_capabilities(device: DeviceInfo) -> Capabilities:
    # A process that opens a TPU has it alone, so that a list must not open one.
    return capabilities_of(device)


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    from isthmus_tpu.backend import open_backend

    return open_backend(device, options)
