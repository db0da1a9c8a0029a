"""A CUDA device, open: which part serves what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch

from isthmus.contract import Capabilities, DeviceInfo, GraphScope
from isthmus.errors import BackendError, BackendUnavailable
from isthmus.reference import ReferenceCollectives
from isthmus_cuda.flash import FlashAttention, find_flash
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import TritonAttention
from isthmus_triton.graphs import StreamGraphs
from isthmus_triton.inputs import TritonInputs
from isthmus_triton.launch import TABLES, launch_table
from isthmus_triton.memory import StreamMemory
from isthmus_triton.ops import TritonOps
from isthmus_triton.sampling import TritonSampling

OLDEST: Final = (8, 0)
"""Compute capability from which bf16 and asynchronous copies are there."""

EIGHT_BIT_FLOATS: Final = (8, 9)
"""Compute capability from which float8_e4m3fn is converted by the device."""

CAPABILITIES: Final = Capabilities(
    dtypes=("bfloat16", "float16", "float32"),
    kv_dtypes=("bfloat16", "float16", "float32"),
    block_sizes=(16, 32, 64, 128),
    graph_scope=GraphScope.STEP,
    # A step of more tokens takes the device longer than its launches take the host.
    mixed_graph_tokens=(16, 32, 64, 96, 128, 192, 256, 384, 512),
    max_steps_in_flight=2,
    sliding_window=True,
    logit_softcap=True,
    experts=True,
    default_max_rows=768,
    default_max_tokens=8192,
)


def capabilities_of(capability: tuple[int, int]) -> Capabilities:
    if capability < EIGHT_BIT_FLOATS:
        return CAPABILITIES
    return replace(CAPABILITIES, kv_dtypes=(*CAPABILITIES.kv_dtypes, "float8_e4m3fn"))


class CudaBackend:
    """:class:`isthmus.contract.Backend` of one CUDA device."""

    name = "cuda"

    def __init__(self, info: DeviceInfo, flash: str = "auto") -> None:
        self.device = info
        device = torch.device("cuda", info.index)
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        self._arch = f"sm_{properties.major}{properties.minor}"
        self.capabilities = capabilities_of((properties.major, properties.minor))
        eight_bits = "float8_e4m3fn" in self.capabilities.kv_dtypes
        table = launch_table(self._arch)
        self.memory = StreamMemory(device)
        units = properties.multi_processor_count
        # One for all parts: whichever is launched first waits for everything begun.
        ahead = CompileAhead(device)
        self._flash = find_flash(self._arch, flash)
        self.attention = (
            TritonAttention(device, table, units, eight_bit_cache=eight_bits, ahead=ahead)
            if self._flash.function is None
            else FlashAttention(device, table, units, self._flash.function, eight_bit_cache=eight_bits, ahead=ahead)
        )
        self.ops = TritonOps(device, table, ahead=ahead)
        self.sampling = TritonSampling(device, table, ahead)
        self.inputs = TritonInputs(device, ahead)
        self.graphs = StreamGraphs(device)
        self.collectives = ReferenceCollectives()

    def providers(self) -> dict[str, str]:
        table = "its own table" if self._arch in TABLES else "the table of small tiles: none was measured for it"
        return {
            "attention": f"Triton kernels, launch parameters for {self._arch} from {table}",
            "attention of long spans": self._flash.reason,
            "linear": "cuBLAS; Triton for few rows where the table says that it is faster",
            "norm, rotary, activation, embedding": "Triton kernels",
            "experts": "Triton kernels",
            "sampling": "Triton kernels",
            "inputs": "Triton kernels",
            "graphs": "CUDA graphs of whole steps, where they decode or are short",
        }

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def open_backend(device: DeviceInfo, options: dict[str, Any]) -> CudaBackend:
    """Raises :class:`BackendError` for an unknown option, :class:`BackendUnavailable` for a device of no use."""
    unknown = sorted(set(options) - {"flash"})
    if unknown:
        raise BackendError(f"the cuda backend has no option {', '.join(unknown)}; it takes flash=auto or flash=off")
    flash = options.get("flash", "auto")
    if flash not in ("auto", "off"):
        raise BackendError(f"the cuda backend's option flash is {flash!r}; it must be auto or off")
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"torch {torch.__version__} cannot use {device.name}; "
            f"install a build of torch for this driver's CUDA version"
        )
    capability = torch.cuda.get_device_capability(device.index)
    if capability < OLDEST:
        raise BackendUnavailable(
            f"{device.name} has compute capability {capability[0]}.{capability[1]}; "
            f"the cuda backend needs at least {OLDEST[0]}.{OLDEST[1]}"
        )
    return CudaBackend(device, flash)
