"""Finding NeuronCores: by AWS's software where that counts them, by the driver where counting would take them."""

from __future__ import annotations

import os
from pathlib import Path

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus_neuron import artefacts, hardware, sdk
from isthmus_neuron.sdk import Route, Sdk


def probe_devices(root: Path = Path("/")) -> list[DeviceInfo]:
    """One for each NeuronCore that this process may use, none of them opened.

    Raises :class:`BackendUnavailable` where the software is missing, or finds no device.
    """
    found = sdk.find()
    artefacts.configure(found.route, sdk.compiler_version(), os.environ)
    return _native_devices(found) if found.route is Route.NATIVE else _xla_devices(found, root)


def _native_devices(found: Sdk) -> list[DeviceInfo]:
    neuron = sdk.load_native()
    count = int(neuron.device_count())
    if count == 0:
        raise BackendUnavailable(
            f"torch-neuronx {found.version} finds no NeuronCore; see what neuron-ls says (it drives Trainium2 and 3: "
            f"Inferentia2 and Trainium1 need the {sdk.XLA_LINE} line, over torch_xla), and give a container the "
            f"devices /dev/neuron*"
        )
    return [DeviceInfo(backend="neuron", index=index, name="AWS NeuronCore") for index in range(count)]


def _xla_devices(found: Sdk, root: Path) -> list[DeviceInfo]:
    if found.rehearsal:
        name = "the host's processor, in an AWS NeuronCore's place"
        return [DeviceInfo(backend="neuron", index=0, name=name, host=True, auto=False)]
    cores = hardware.visible_cores(root)
    if not cores:
        raise BackendUnavailable(
            f"torch-neuronx {found.version} is installed and the driver lists no NeuronCore for it; see what neuron-ls "
            f"and {hardware.VISIBLE_CORES} say, install aws-neuronx-dkms, and give a container the devices /dev/neuron*"
        )
    return [
        DeviceInfo(backend="neuron", index=core.index, name=f"AWS {core.chip}", memory_bytes=core.total_bytes)
        for core in cores
    ]
