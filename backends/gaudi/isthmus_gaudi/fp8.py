"""8-bit weights in the range that a Gaudi multiplies.

Both generations hold e4m3 with exponent bias 7, in torch's ``float8_e4m3fn``.  Gaudi 3 has that form's whole range,
448.  Gaudi 2 keeps the largest exponent for infinities and NaN, so its largest number is 240, that of the fnuz form,
though its bits mean what e4m3fn's do: unlike an MI300 it needs other numbers and not other bits.  Sources: Intel's
tests of its PyTorch bridge (``tests/pytest_working/any_mode/test_hpu_fp8_ops_any_mode.py``: casts clip to 240 on
Gaudi 2 and to 448 else) and vllm-gaudi (``FP8_MAX`` and ``gaudi_weight_wrapper`` in ``extension/ops.py``).

Weights are ``weight * scale``, with one scale an output channel [out, 1] or one for all [1, 1].  A product quantises
the activations as they come, one scale a token.

Proved on a CPU: ranges, rounding, the conversion of checkpoints, and that the vendor's operators are called as
their schemas say.  Not proved, for want of the device: that the device decodes and multiplies as described, its
accuracy, its speed, and its faster forms (scales that are powers of two).

The backend's option ``fp8=on`` quantises weights as they are loaded (:mod:`isthmus_gaudi.ops`).  A checkpoint that is
in 8 bits already is for :func:`from_checkpoint`, which nothing calls as long as the engine loads none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

FP8: Final = torch.float8_e4m3fn
GAUDI2_LIMIT: Final = 240.0
GAUDI3_LIMIT: Final = 448.0

SMALLEST: Final = 1e-12
"""A largest number below this is taken for it, so that a row of zeros has a scale to divide by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A prepared linear weight: ``weight * scale``, with no number of ``weight`` beyond ``limit``."""

    weight: Tensor  # float8_e4m3fn [out, in]
    scale: Tensor  # float32 [out, 1] or [1, 1]
    limit: float
    bias: Tensor | None = None  # [out], in the dtype of the activations

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def dequantized(self) -> Tensor:
        """float32 [out, in]."""
        return self.weight.float() * self.scale


def quantize(weight: Tensor, limit: float, *, per_channel: bool = True, bias: Tensor | None = None) -> Fp8Weight:
    """``weight`` [out, in] in 8 bits, its largest number (a channel's, or all) at ``limit``.

    A number is off by a sixteenth of itself at most, or by ``scale / 1024`` where that is more (the subnormals).
    """
    dims = (1,) if per_channel else (0, 1)
    scale = weight.float().abs().amax(dims, keepdim=True).clamp(min=SMALLEST) / limit
    # Casts differ in what they do beyond the range, between versions of torch and between devices.
    scaled = (weight.float() / scale).clamp(-limit, limit)
    return Fp8Weight(weight=scaled.to(FP8), scale=scale, limit=limit, bias=bias)


def from_checkpoint(weight: Tensor, scale: Tensor, limit: float, *, bias: Tensor | None = None) -> Fp8Weight:
    """A checkpoint's e4m3fn ``weight`` [out, in] and ``scale`` (one, or [out] or [out, 1]) within ``limit``.

    Channels that go beyond ``limit`` are halved and their scales doubled, all channels where they share one scale;
    others stay as they are.  Half of 448 is within 240.  Halving is exact but for odd multiples of 2**-9 below 2**-5,
    which lose that last bit: less than a hundred-thousandth of the channel's largest number.  NaN stays NaN.
    """
    assert weight.dtype == FP8, f"the weight is {weight.dtype}, not {FP8}"
    assert limit >= GAUDI2_LIMIT, f"half of {GAUDI3_LIMIT} is not within {limit}"
    assert scale.numel() in (1, len(weight)), f"{tuple(scale.shape)} scales for {len(weight)} channels"
    scale = scale.float().reshape(-1, 1)
    numbers = weight.float()
    beyond = (numbers.abs() > limit).any(1, keepdim=True)
    if len(scale) == 1:
        beyond = beyond.any(0, keepdim=True)
    halved = torch.where(beyond, numbers * 0.5, numbers).to(FP8)
    return Fp8Weight(weight=halved, scale=torch.where(beyond, scale * 2.0, scale), limit=limit, bias=bias)


def has_fp8_gemm() -> bool:
    """Whether the vendor's operators are loaded in this process."""
    return hasattr(torch.ops.hpu, "fp8_gemm_v2") and hasattr(torch.ops.hpu, "cast_to_fp8_v2")


def linear_fp8(x: Tensor, weight: Fp8Weight, *, native: bool) -> Tensor:
    """``x @ weight.T + bias``: [tokens, in] to [tokens, out] in the dtype of ``x``.

    ``native`` (see :func:`has_fp8_gemm`) multiplies in 8 bits by the vendor's operators, with ``x`` quantised token by
    token.  Otherwise the weight is taken back to the dtype of ``x``, and ``x`` stays whole.
    """
    if not native:
        return F.linear(x, weight.dequantized().to(x.dtype), weight.bias)
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=SMALLEST) / weight.limit  # [tokens, 1]
    # The cast multiplies by what it is given, and clips to the device's range; the product multiplies by its scales.
    quantized = torch.ops.hpu.cast_to_fp8_v2(x, 1.0 / scale, False, False, FP8)[0]
    product: Tensor = torch.ops.hpu.fp8_gemm_v2(
        quantized, False, weight.weight, True, None, x.dtype, scale, weight.scale.transpose(0, 1), weight.bias, False
    )
    return product
