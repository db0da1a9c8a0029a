"""A Gaudi, open: which part serves what."""

from __future__ import annotations

import os
from typing import Any, Final

import torch

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendError, BackendUnavailable
from isthmus_gaudi import sdk
from isthmus_gaudi.capabilities import CAPABILITIES
from isthmus_gaudi.fp8 import GAUDI2_LIMIT, GAUDI3_LIMIT, has_fp8_gemm
from isthmus_gaudi.layout import FlatLayout
from isthmus_gaudi.ops import Fp8Ops
from isthmus_static.backend import StaticBackend, Target
from isthmus_static.memory import EventMemory
from isthmus_static.options import require_known, with_buckets

COMPILER: Final = "hpu_backend"
FP8_LIMITS: Final = {"GAUDI2": GAUDI2_LIMIT, "GAUDI3": GAUDI3_LIMIT}
"""By what the bridge calls the device."""


def open_backend(device: DeviceInfo, options: dict[str, Any]) -> StaticBackend:
    """Options are the buckets and ``fp8=on``, 8-bit linear weights.

    Raises :class:`BackendError` for another option or for fp8 on a device without, :class:`BackendUnavailable`
    where the device does not open.
    """
    require_known("gaudi", options, {"fp8": ("off", "on")})
    capabilities = with_buckets(CAPABILITIES, options)
    hpu = sdk.load()
    try:
        hpu.set_device(device.index)
        kind = str(hpu.get_device_name())
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BackendUnavailable(
            f"gaudi:{device.index} does not open: {' '.join(str(error).split())}; see with hl-smi whether another "
            f"process has it, and name the modules that this one may use in HABANA_VISIBLE_MODULES"
        ) from error
    where = torch.device("hpu", hpu.current_device())
    native = has_fp8_gemm()
    memory = EventMemory(where)
    return StaticBackend(
        Target(
            name="gaudi",
            device=device,
            capabilities=capabilities,
            torch_device=where,
            compiler=COMPILER,
            providers=_providers(kind, options.get("fp8") == "on", native),
            layout=FlatLayout(),
            memory=memory,
            ops=Fp8Ops(where, _fp8_limit(kind), native=native) if options.get("fp8") == "on" else None,
            on_close=memory.synchronize,
        )
    )


def _fp8_limit(kind: str) -> float:
    if kind not in FP8_LIMITS:
        raise BackendError(
            f"fp8=on needs one of {', '.join(FP8_LIMITS)}, and this device is {kind}; leave the option out"
        )
    return FP8_LIMITS[kind]


def _providers(kind: str, fp8: bool, native: bool) -> dict[str, str]:
    return {
        "attention": "flat paged attention: one list of blocks, one-hot products (single tokens)",
        "attention of long spans": "matrix products over gathered blocks, in tiles of queries",
        "linear": _linear(kind, native) if fp8 else "torch's, in the model's dtype; fp8=on quantises them as they load",
        "norm, rotary, activation, embedding": f"torch operations, fused by {COMPILER}",
        "compiled recipes": sdk.recipe_cache_said(os.environ),
    }


def _linear(kind: str, native: bool) -> str:
    weights = f"8-bit weights within {FP8_LIMITS.get(kind, 0.0):g}, a scale an output channel"
    if native:
        return f"{weights}, multiplied in 8 bits by the bridge's fp8_gemm_v2"
    return f"{weights}, taken back to the model's dtype: this bridge has no fp8_gemm_v2"
