"""The open device: its own attention, sampling and graphs, and the reference for the rest."""

from __future__ import annotations

import torch

from isthmus.contract import Capabilities, DeviceInfo
from isthmus.reference import ReferenceCollectives, ReferenceInputs, ReferenceMemory, ReferenceOps
from isthmus_numpy import CAPABILITIES, DEVICE
from isthmus_numpy.attention import NumpyAttention
from isthmus_numpy.graphs import NumpyGraphs
from isthmus_numpy.sampling import NumpySampling


class NumpyBackend:
    name = "numpy"
    device: DeviceInfo = DEVICE
    capabilities: Capabilities = CAPABILITIES

    def __init__(self) -> None:
        host = torch.device("cpu")
        self.attention = NumpyAttention()
        self.sampling = NumpySampling()
        self.graphs = NumpyGraphs()
        self.ops = ReferenceOps(host)
        self.inputs = ReferenceInputs(host)
        self.memory = ReferenceMemory(host, asynchronous=True)
        self.collectives = ReferenceCollectives()

    def providers(self) -> dict[str, str]:
        numpy = "numpy: this is what the example shows"
        return {"attention": numpy, "sampling": numpy, "graphs": numpy, "ops": "plain torch, the reference's"}

    def close(self) -> None:
        self.memory.close()
