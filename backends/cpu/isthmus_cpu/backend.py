"""The open CPU: which parts serve, and what they say of themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from isthmus.contract import (
    Attention,
    Backend,
    Capabilities,
    DeviceInfo,
    Graphs,
    GraphScope,
    Inputs,
    Ops,
    Sampling,
)
from isthmus.errors import BackendUnavailable
from isthmus.reference import (
    ReferenceAttention,
    ReferenceCollectives,
    ReferenceGraphs,
    ReferenceInputs,
    ReferenceSampling,
)
from isthmus_cpu.attention import PanelAttention
from isthmus_cpu.build import kernels_library
from isthmus_cpu.graphs import TapeGraphs
from isthmus_cpu.inputs import PanelInputs
from isthmus_cpu.library import Library, Pool
from isthmus_cpu.memory import HostMemory
from isthmus_cpu.ops import PanelOps
from isthmus_cpu.options import CpuOptions, KernelUse
from isthmus_cpu.plain import OneDnnOps, onednn_packs
from isthmus_cpu.runner import Runner
from isthmus_cpu.sampling import PanelSampling

logger = logging.getLogger(__name__)

PLAIN = Capabilities(
    dtypes=("float32",),
    kv_dtypes=("float32",),
    block_sizes=(16, 32, 64, 128),
    max_head_dim=256,
    max_steps_in_flight=2,
    sliding_window=True,
    logit_softcap=True,
    experts=True,
    unified_memory=True,
    default_max_tokens=512,
)
COMPILED = replace(
    PLAIN,
    # A checkpoint in half precision, or quantised, is kept in bfloat16 unless float32 is asked for.
    dtypes=("bfloat16", "float32"),
    kv_dtypes=("bfloat16", "float32"),
    graph_scope=GraphScope.FORWARD,
    graph_any_size=True,
)
_CPU = torch.device("cpu")


class CpuBackend:
    """:class:`isthmus.contract.Backend` of the machine's own cores.  Steps run on one worker thread."""

    name = "cpu"

    def __init__(
        self,
        device: DeviceInfo,
        capabilities: Capabilities,
        providers: dict[str, str],
        *,
        ops: Ops,
        attention: Attention,
        sampling: Sampling,
        inputs: Inputs,
        graphs: Graphs,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = device
        self.capabilities = capabilities
        self._providers = providers
        self.ops = ops
        self.attention = attention
        self.sampling = sampling
        self.inputs = inputs
        self.graphs = graphs
        self._on_close = on_close
        self.memory = HostMemory()
        self.collectives = ReferenceCollectives()

    def providers(self) -> dict[str, str]:
        return dict(self._providers)

    def close(self) -> None:
        self.memory.close()
        self._on_close()


def open_backend(device: DeviceInfo, options: CpuOptions) -> Backend:
    """Raises :class:`BackendUnavailable` where kernels are required and cannot be had."""
    if options.kernels is KernelUse.OFF:
        return _open_plain(device, options, "kernels=off")
    try:
        library = Library(kernels_library())
    except BackendUnavailable as error:
        if options.kernels is KernelUse.REQUIRE:
            raise
        logger.warning("plain torch serves, more slowly: %s", error)
        return _open_plain(device, options, f"no compiled kernels: {error}")
    return _open_compiled(device, options, library)


def _open_plain(device: DeviceInfo, options: CpuOptions, reason: str) -> Backend:
    torch.set_num_threads(options.threads)
    halves = onednn_packs(torch.bfloat16)
    capabilities = replace(
        PLAIN,
        dtypes=("bfloat16", "float32") if halves else PLAIN.dtypes,
        kv_dtypes=("bfloat16", "float32") if halves else PLAIN.kv_dtypes,
    )
    packing = "oneDNN packed linears" if onednn_packs(torch.float32) else "torch linears"
    return CpuBackend(
        device,
        capabilities,
        {
            "ops": f"torch, {packing} ({reason})",
            "attention": "torch",
            "sampling": "reference",
            "graphs": "none",
        },
        ops=OneDnnOps(),
        attention=ReferenceAttention(_CPU),
        sampling=ReferenceSampling(_CPU),
        inputs=ReferenceInputs(_CPU),
        graphs=ReferenceGraphs(),
    )


def _open_compiled(device: DeviceInfo, options: CpuOptions, library: Library) -> Backend:
    # The little that torch does is not worth its threads, which spin after their work.
    torch.set_num_threads(1)
    pool = Pool(library, options.threads)
    runner = Runner(pool)
    ops = PanelOps(library, runner, options.threads)
    inputs = PanelInputs(library)
    kernels = f"compiled, {library.instructions}, {options.threads} threads"

    def close() -> None:
        ops.close()
        pool.close()

    return CpuBackend(
        device,
        COMPILED,
        {"ops": kernels, "attention": kernels, "sampling": f"greedy {kernels}; else reference", "graphs": "tape"},
        ops=ops,
        attention=PanelAttention(runner, library.value_padding),
        sampling=PanelSampling(runner, inputs),
        inputs=inputs,
        graphs=TapeGraphs(pool, runner, inputs, library.panel),
        on_close=close,
    )
