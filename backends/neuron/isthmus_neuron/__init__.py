"""AWS Trainium and Inferentia2: steps compiled in static shapes, by TorchNeuron's own device or through torch_xla."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from isthmus.contract import Capabilities, DeviceInfo
from isthmus.hookspecs import hookimpl
from isthmus_neuron.capabilities import capabilities_of
from isthmus_neuron.probe import probe_devices

if TYPE_CHECKING:
    from isthmus.contract import Backend

CONTRACT_VERSION: Final = (1, 0)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return probe_devices()


@hookimpl
def isthmus_capabilities(device: DeviceInfo) -> Capabilities:
    # A process that opens a NeuronCore has it alone, so that a list must not open one.
    return capabilities_of(device)


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    from isthmus_neuron.backend import open_backend

    return open_backend(device, options)
