"""The contract between Isthmus and a backend: data, protocols, version.  Imports no torch."""

from isthmus.contract.capabilities import BlockCount, Capabilities, DeviceInfo, GraphScope, ShapePolicy, SpanMix
from isthmus.contract.execution import ExecutorBackend, ModelFacts
from isthmus.contract.inputs import DeviceState, Limits, Sampled, StepInputs, StepShape
from isthmus.contract.parts import (
    Attention,
    AttentionSpec,
    Backend,
    CapturedGraph,
    Collectives,
    Graphs,
    Inputs,
    LinearWeight,
    Memory,
    Ops,
    PartlyCapturedSampling,
    Pending,
    QkNorm,
    RotarySpec,
    Sampling,
    StepExecutor,
)
from isthmus.contract.version import CONTRACT_VERSION, ContractVersion, require_compatible

__all__ = [
    "CONTRACT_VERSION",
    "Attention",
    "AttentionSpec",
    "Backend",
    "BlockCount",
    "Capabilities",
    "CapturedGraph",
    "Collectives",
    "ContractVersion",
    "DeviceInfo",
    "DeviceState",
    "ExecutorBackend",
    "GraphScope",
    "Graphs",
    "Inputs",
    "Limits",
    "LinearWeight",
    "Memory",
    "ModelFacts",
    "Ops",
    "PartlyCapturedSampling",
    "Pending",
    "QkNorm",
    "RotarySpec",
    "Sampled",
    "Sampling",
    "ShapePolicy",
    "SpanMix",
    "StepExecutor",
    "StepInputs",
    "StepShape",
    "require_compatible",
]
