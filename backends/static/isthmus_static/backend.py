"""A whole backend out of a torch device and a Dynamo compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from isthmus.contract import Capabilities, DeviceInfo, Memory
from isthmus.reference import ReferenceCollectives
from isthmus_static.attention import StaticAttention
from isthmus_static.inputs import StaticInputs
from isthmus_static.layout import AttentionLayout
from isthmus_static.memory import StaticMemory
from isthmus_static.ops import StaticOps
from isthmus_static.programs import Programs
from isthmus_static.row_attention import RowLayout
from isthmus_static.sampling import StaticSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a vendor's package brings."""

    name: str
    device: DeviceInfo
    capabilities: Capabilities
    torch_device: torch.device
    compiler: str
    """Name of a Dynamo backend."""
    providers: dict[str, str]
    layout: AttentionLayout = field(default_factory=RowLayout)
    slot_multiple: int = 0
    allocates_late: bool = False
    """See :class:`StaticAttention` for both."""
    memory: Memory | None = None
    programs: Programs | None = None
    """Where they are not made by Dynamo alone."""
    ops: StaticOps | None = None
    on_close: Callable[[], None] = lambda: None


class StaticBackend:
    """:class:`isthmus.contract.Backend`."""

    def __init__(self, target: Target) -> None:
        where = target.torch_device
        self._target = target
        self.name, self.device, self.capabilities = target.name, target.device, target.capabilities
        self.graphs = target.programs or Programs(target.compiler)
        self.memory = target.memory or StaticMemory(where)
        self.ops = target.ops or StaticOps(where)
        self.inputs = StaticInputs(where, target.layout, self.graphs)
        self.attention = StaticAttention(
            where,
            self.inputs,
            target.layout,
            slot_multiple=target.slot_multiple,
            allocates_late=target.allocates_late,
        )
        self.sampling = StaticSampling(where, self.inputs, self.graphs)
        self.collectives = ReferenceCollectives()

    def providers(self) -> dict[str, str]:
        return {
            "attention": "matrix products over gathered blocks, in static shapes",
            "linear, norm, rotary, activation, embedding": "torch operations, fused by the compiler",
            "experts": "all experts for every token, weighted by the router",
            "sampling": "compiled for greedy rows and for temperature, top_k, top_p and min_p; the rest on the host",
            "inputs": "packed on the host, sliced in the graph",
            "graphs": f"one for each shape, compiled by {self._target.compiler}",
            **self._target.providers,
        }

    def close(self) -> None:
        self._target.on_close()
