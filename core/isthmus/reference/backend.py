"""A whole backend in plain torch: the semantics every other backend is held to."""

from __future__ import annotations

import torch

from isthmus.contract import (
    Attention,
    Capabilities,
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
        self.name = name
        self.capabilities = capabilities
        self._own_memory = ReferenceMemory(where, asynchronous=asynchronous) if memory is None else None
        self.memory: Memory = memory or self._own_memory  # type: ignore[assignment]  # one of the two is set
        self.attention = attention or ReferenceAttention(where)
        self.ops = ops or ReferenceOps(where)
        self.sampling = sampling or ReferenceSampling(where)
        self.inputs = inputs or ReferenceInputs(where)
        self.graphs = graphs or ReferenceGraphs()
        self.collectives = ReferenceCollectives()
        self.device = DeviceInfo(
            backend=name, index=where.index or 0, name=str(where), memory_bytes=self.memory.total_bytes()
        )

    def providers(self) -> dict[str, str]:
        parts = {
            "attention": self.attention,
            "ops": self.ops,
            "sampling": self.sampling,
            "inputs": self.inputs,
            "graphs": self.graphs,
            "memory": self.memory,
        }
        return {part: type(implementation).__name__ for part, implementation in parts.items()}

    def close(self) -> None:
        if self._own_memory is not None:
            self._own_memory.close()
