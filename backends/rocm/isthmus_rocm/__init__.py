"""The ROCm backend: the Triton kernels, AMD's matrix libraries through torch, and steps captured as HIP graphs.

A build of torch for ROCm answers to ``torch.cuda`` and to the device name "cuda"; ``torch.version.hip``
tells it apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from isthmus.contract import DeviceInfo
from isthmus.hookspecs import hookimpl
from isthmus_rocm.probe import probe_devices

if TYPE_CHECKING:
    from isthmus.contract import Backend

CONTRACT_VERSION: Final = (1, 0)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return probe_devices()


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    from isthmus_rocm.backend import open_backend

    return open_backend(device, options)
