"""A whole backend in plain torch: the semantics every other backend is held to."""

from __future__ import annotations

import torch

from isthmus.contract import (
    Attention,
    Capabilities,
    Collectives,
    DeviceInfo,
    Graphs,
    Inputs,
    Memory,
    Ops,
    Sampling,
)
from isthmus.reference.attention import ReferenceAttention
from isthmus.reference.graphs import ReferenceCollectives, ReferenceGraphs
from isthmus.reference.inputs import ReferenceInputs
from isthmus.reference.memory import ReferenceMemory
from isthmus.reference.ops import ReferenceOps
from isthmus.reference.sampling import ReferenceSampling

REFERENCE_CAPABILITIES = Capabilities(
    dtypes=("float32", "bfloat16", "float16"),
    kv_dtypes=("float32", "bfloat16", "float16", "float8_e4m3fn"),
    block_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
    sliding_window=True,
    logit_softcap=True,
    experts=True,
)


class ReferenceBackend:
    """:class:`isthmus.contract.Backend` out of reference parts, or of others given in their place.

    ``capabilities`` is taken at its word, so that a test can play any device; the parts do not
    depend on it.  ``asynchronous`` runs steps on a worker thread.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        name: str = "reference",
        capabilities: Capabilities = REFERENCE_CAPABILITIES,
        asynchronous: bool = False,
        attention: Attention | None = None,
        ops: Ops | None = None,
        sampling: Sampling | None = None,
        inputs: Inputs | None = None,
        graphs: Graphs | None = None,
        memory: Memory | None = None,
    ) -> None:
        where = torch.device(device)
        self._name = name
        self._capabilities = capabilities
        self._own_memory = ReferenceMemory(where, asynchronous=asynchronous) if memory is None else None
        self._memory: Memory = memory or self._own_memory  # type: ignore[assignment]  # one of the two is set
        self._attention = attention or ReferenceAttention(where)
        self._ops = ops or ReferenceOps(where)
        self._sampling = sampling or ReferenceSampling(where)
        self._inputs = inputs or ReferenceInputs(where)
        self._graphs = graphs or ReferenceGraphs()
        self._collectives = ReferenceCollectives()
        self._device = DeviceInfo(
            backend=name, index=where.index or 0, name=str(where), memory_bytes=self._memory.total_bytes()
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> DeviceInfo:
        return self._device

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def attention(self) -> Attention:
        return self._attention

    @property
    def ops(self) -> Ops:
        return self._ops

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    @property
    def inputs(self) -> Inputs:
        return self._inputs

    @property
    def graphs(self) -> Graphs:
        return self._graphs

    @property
    def memory(self) -> Memory:
        return self._memory

    @property
    def collectives(self) -> Collectives:
        return self._collectives

    def providers(self) -> dict[str, str]:
        parts = {
            "attention": self._attention,
            "ops": self._ops,
            "sampling": self._sampling,
            "inputs": self._inputs,
            "graphs": self._graphs,
            "memory": self._memory,
        }
        return {part: type(implementation).__name__ for part, implementation in parts.items()}

    def close(self) -> None:
        if self._own_memory is not None:
            self._own_memory.close()
