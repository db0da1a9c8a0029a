"""An AMD device, open: which part serves what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from isthmus.contract import Capabilities, DeviceInfo, GraphScope
from isthmus.errors import BackendError, BackendUnavailable
from isthmus.reference import ReferenceCollectives
from isthmus_rocm.aiter import AiterAttention, AttentionFunction, find_aiter
from isthmus_rocm.architecture import architecture
from isthmus_rocm.targets import TARGETS, Target
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import TritonAttention
from isthmus_triton.graphs import StreamGraphs
from isthmus_triton.inputs import TritonInputs
from isthmus_triton.memory import StreamMemory
from isthmus_triton.ops import TritonOps
from isthmus_triton.sampling import TritonSampling

CAPABILITIES: Final = Capabilities(
    dtypes=("bfloat16", "float16"),
    kv_dtypes=("bfloat16", "float16"),
    block_sizes=(16, 32, 64, 128),
    graph_scope=GraphScope.STEP,
    max_steps_in_flight=2,
    sliding_window=True,
    logit_softcap=True,
    experts=True,
    default_max_rows=768,
    default_max_tokens=8192,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RocmBackend:
    """:class:`isthmus.contract.Backend` of one AMD device."""

    device: DeviceInfo
    capabilities: Capabilities
    arch: str
    wide_logits: bool
    attention: TritonAttention
    ops: TritonOps
    sampling: TritonSampling
    inputs: TritonInputs
    graphs: StreamGraphs
    memory: StreamMemory
    collectives: ReferenceCollectives
    name: str = "rocm"

    def providers(self) -> dict[str, str]:
        logits = "float32 from its accumulators" if self.wide_logits else "rounded to the weights' dtype first"
        return {
            "attention": f"Triton kernels, launch parameters for {self.arch}, none of them measured",
            "attention of long spans": self._long_spans(),
            "linear": f"hipBLASLt or rocBLAS, as torch chooses; logits are {logits}",
            "norm, rotary, activation, embedding": "Triton kernels",
            "experts": "Triton kernels",
            "sampling": "Triton kernels",
            "inputs": "Triton kernels",
            "graphs": "HIP graphs of whole decode steps",
        }

    def _long_spans(self) -> str:
        if isinstance(self.attention, AiterAttention):
            return "AITER's unified attention, by request; never measured against the Triton kernels"
        return "Triton kernels; AITER's are off, for nothing was measured: aiter=on takes them"

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def open_backend(device: DeviceInfo, options: dict[str, Any]) -> RocmBackend:
    """Raises :class:`BackendError` for an unknown option, :class:`BackendUnavailable` for a device of no use."""
    unknown = sorted(set(options) - {"aiter"})
    if unknown:
        raise BackendError(f"the rocm backend has no option {', '.join(unknown)}; it takes aiter=off or aiter=on")
    aiter = options.get("aiter", "off")
    if aiter not in ("off", "on"):
        raise BackendError(f"the rocm backend's option aiter is {aiter!r}; it must be off or on")
    if torch.version.hip is None:
        raise BackendUnavailable(
            f"torch {torch.__version__} is not built for ROCm; "
            f"install that build from the package index of the PyTorch project"
        )
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"torch {torch.__version__} (HIP {torch.version.hip}) cannot use {device.name}; "
            f"see what rocminfo says, and install the build of torch for this driver's ROCm version"
        )
    properties = torch.cuda.get_device_properties(device.index)
    arch = architecture(properties.gcnArchName)
    target = require_target(device.name, arch)
    function = find_aiter(arch) if aiter == "on" else None
    return _assemble(device, arch, target, properties.multi_processor_count, function)


def require_target(name: str, arch: str) -> Target:
    """The launch parameters of ``arch``.  Raises :class:`BackendUnavailable` where there are none."""
    if arch not in TARGETS:
        raise BackendUnavailable(
            f"{name} is {arch}, for which the kernels have no launch parameters; "
            f"they have some for {', '.join(TARGETS)}"
        )
    return TARGETS[arch]


def capabilities_of(target: Target) -> Capabilities:
    eight_bits = ("float8_e4m3fn",) if target.eight_bit_cache else ()
    return replace(CAPABILITIES, kv_dtypes=(*CAPABILITIES.kv_dtypes, *eight_bits), max_head_dim=target.max_head_dim)


def hip_device(index: int) -> torch.device:
    """Torch calls it "cuda" here too."""
    return torch.device("cuda", index)


def _assemble(
    info: DeviceInfo, arch: str, target: Target, compute_units: int, aiter: AttentionFunction | None
) -> RocmBackend:
    device = hip_device(info.index)
    torch.cuda.set_device(device)
    wide = has_wide_products(device)
    eight_bits = target.eight_bit_cache
    # One for all parts: whichever is launched first waits for everything begun.
    ahead = CompileAhead(device)
    attention = (
        TritonAttention(device, target.launch, compute_units, eight_bit_cache=eight_bits, ahead=ahead)
        if aiter is None
        else AiterAttention(device, target.launch, compute_units, aiter, eight_bit_cache=eight_bits, ahead=ahead)
    )
    return RocmBackend(
        device=info,
        capabilities=capabilities_of(target),
        arch=arch,
        wide_logits=wide,
        attention=attention,
        ops=TritonOps(device, target.launch, wide_logits=wide, ahead=ahead),
        sampling=TritonSampling(device, target.launch, ahead),
        inputs=TritonInputs(device, ahead),
        graphs=StreamGraphs(device),
        memory=StreamMemory(device),
        collectives=ReferenceCollectives(),
    )


def has_wide_products(device: torch.device) -> bool:
    """Whether this build multiplies 16-bit matrices into float32, and rightly: older ones for ROCm refuse."""
    for dtype in (torch.bfloat16, torch.float16):
        # Products of these are exact in float32 and not in 16 bits.
        x = (torch.arange(256, device=device).reshape(16, 16) - 100).to(dtype)
        try:
            product = torch.mm(x, x.t(), out_dtype=torch.float32)
        except RuntimeError:
            return False
        if not torch.equal(product, x.float() @ x.float().t()):
            return False
    return True
