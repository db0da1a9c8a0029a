"""Opening a NeuronCore, by the route whose software is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from isthmus.contract import Backend, Capabilities, DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus_neuron import artefacts, hardware, sdk
from isthmus_neuron.capabilities import capabilities_of
from isthmus_neuron.layout import TiledRowLayout
from isthmus_neuron.memory import NeuronMemory, NeuronXlaMemory
from isthmus_neuron.ops import DocumentedOps
from isthmus_neuron.sdk import Route, Sdk
from isthmus_static.backend import StaticBackend, Target
from isthmus_static.options import require_known, with_buckets
from isthmus_static.xla_programs import XlaPrograms


def open_backend(device: DeviceInfo, options: Mapping[str, Any]) -> Backend:
    """``options`` are the buckets of :mod:`isthmus_static.options`.

    Raises :class:`isthmus.errors.BackendError` for an option that there is not, and
    :class:`BackendUnavailable` where AWS's software is gone or does not start.
    """
    require_known("neuron", options, {})
    capabilities = with_buckets(capabilities_of(device), options)
    found = sdk.find()
    artefacts.configure(found.route, sdk.compiler_version(), os.environ)
    make = _native if found.route is Route.NATIVE else _over_xla
    return StaticBackend(make(found, device, capabilities))


def _native(found: Sdk, device: DeviceInfo, capabilities: Capabilities) -> Target:
    neuron = sdk.load_native()
    where = torch.device("neuron", device.index)
    neuron.set_device(device.index)
    return Target(
        name="neuron",
        device=device,
        capabilities=capabilities,
        torch_device=where,
        compiler="neuron",
        providers=_providers(found, "torch.compile with the compiler `neuron`, whole graphs of static shapes"),
        layout=TiledRowLayout(),
        memory=NeuronMemory(where, neuron),
        on_close=neuron.empty_cache,
    )


def _over_xla(found: Sdk, device: DeviceInfo, capabilities: Capabilities) -> Target:
    core = None
    if not found.rehearsal:
        core = next((core for core in hardware.cores() if core.index == device.index), None)
        # One core for one process, of those that the user leaves it, chosen before the runtime starts.
        os.environ[hardware.VISIBLE_CORES] = str(device.index)
        os.environ.setdefault("PJRT_DEVICE", "NEURON")
    from isthmus_static import xla

    try:
        where = xla.device()
    except Exception as error:  # torch_xla raises whatever the platform's plugin does
        raise BackendUnavailable(
            f"torch_xla does not start {os.environ['PJRT_DEVICE']} ({' '.join(str(error).split())}); it needs "
            f"libneuronxla of the same release, and a NeuronCore that no other process has"
        ) from error
    graphs = "one program for each shape, through torch_xla's `openxla`; state is written in place by donation"
    return Target(
        name="neuron",
        device=device,
        capabilities=capabilities,
        torch_device=where,
        compiler="openxla",
        providers=_providers(found, graphs) | {"ops": "torch operations that become documented HLO operations alone"},
        layout=TiledRowLayout(),
        memory=NeuronXlaMemory(where, core),
        programs=XlaPrograms(),
        ops=DocumentedOps(where),
    )


def _providers(found: Sdk, graphs: str) -> dict[str, str]:
    return {
        "route": f"{found.route}: {found.reason}",
        "attention": "matrix products over gathered blocks, tables padded to whole tiles of 128 keys",
        "graphs": graphs,
        "artefacts": artefacts.said(found.route, os.environ),
    }
