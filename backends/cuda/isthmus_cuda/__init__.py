"""The CUDA backend: Triton kernels, cuBLAS, and whole steps captured as CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from isthmus.contract import DeviceInfo
from isthmus.hookspecs import hookimpl
from isthmus_cuda.probe import probe_devices

if TYPE_CHECKING:
    from isthmus.contract import Backend

CONTRACT_VERSION: Final = (1, 0)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return probe_devices()


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    from isthmus_cuda.context import begin_context, begin_identifying

    begin_context(device.index)
    begin_identifying()
    from isthmus_cuda.backend import open_backend  # imports torch

    return open_backend(device, options)
