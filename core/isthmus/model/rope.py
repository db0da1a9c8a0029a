"""Tables of cosines and sines for every kind of rotary scaling.

The formulas are those of Hugging Face ``modeling_rope_utils``, in float32 as there, so that tables agree to
the bit: linear (kaiokendev), dynamic NTK (bloc97, emozilla), YaRN (arXiv 2309.00071), LongRoPE
(arXiv 2402.13753) and Llama 3.1's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from isthmus.model.spec import RopeSpec

Frequencies = tuple[Tensor, float]
"""Inverse frequencies [rotary_dim / 2], and what cosines and sines are multiplied by."""


def cos_sin_table(rope: RopeSpec, max_positions: int, device: torch.device) -> Tensor:
    """float32 [max_positions, rotary_dim]: cosines then sines of each position.

    The table is fixed, so kinds whose frequencies depend on a sequence's length take ``max_positions``, the
    longest that will be served: longrope's long factors apply if that is more than the original length,
    dynamic's base if it is more than the model's own.
    """
    inverse, scale = KINDS[rope.kind](rope, max_positions)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1).to(device)


def _powers(rope: RopeSpec, base: float) -> Tensor:
    steps = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    return base**steps


def _number(rope: RopeSpec, name: str) -> float:
    value = rope.parameters[name]
    assert not isinstance(value, tuple)
    return value


def _optional(rope: RopeSpec, name: str) -> float | None:
    return _number(rope, name) if name in rope.parameters else None


def _factors(rope: RopeSpec, name: str) -> Tensor:
    value = rope.parameters[name]
    assert isinstance(value, tuple)
    return torch.tensor(value, dtype=torch.float32)


def _default(rope: RopeSpec, _max_positions: int) -> Frequencies:
    return 1.0 / _powers(rope, rope.theta), 1.0


def _linear(rope: RopeSpec, _max_positions: int) -> Frequencies:
    return 1.0 / _powers(rope, rope.theta) / _number(rope, "factor"), 1.0


def _dynamic(rope: RopeSpec, max_positions: int) -> Frequencies:
    factor = _number(rope, "factor")
    own = _number(rope, "max_position_embeddings")
    stretch = factor * max(max_positions, own) / own - (factor - 1)
    return 1.0 / _powers(rope, rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))), 1.0


def _llama3(rope: RopeSpec, _max_positions: int) -> Frequencies:
    inverse, _ = _default(rope, 0)
    factor = _number(rope, "factor")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    original = _number(rope, "original_max_position_embeddings")
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(is_between, between, scaled), 1.0


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeSpec, _max_positions: int) -> Frequencies:
    original = _number(rope, "original_max_position_embeddings")
    factor = _optional(rope, "factor") or _number(rope, "max_position_embeddings") / original
    scale = _optional(rope, "attention_factor")
    if scale is None:
        mscale, all_dim = _optional(rope, "mscale"), _optional(rope, "mscale_all_dim")
        scale = (
            _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim) if mscale and all_dim else _yarn_scale(factor)
        )

    def dimension(rotations: float) -> float:
        return (rope.rotary_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low = dimension(_optional(rope, "beta_fast") or 32.0)
    high = dimension(_optional(rope, "beta_slow") or 1.0)
    if rope.parameters.get("truncate", 1.0):
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, rope.rotary_dim - 1.0)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(rope, rope.theta)
    keep = 1 - ramp
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, scale


def _longrope(rope: RopeSpec, max_positions: int) -> Frequencies:
    original = _number(rope, "original_max_position_embeddings")
    scale = _optional(rope, "attention_factor")
    if scale is None:
        factor = _optional(rope, "factor") or _number(rope, "max_position_embeddings") / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = _factors(rope, "long_factor" if max_positions > original else "short_factor")
    return 1.0 / (factors * _powers(rope, rope.theta)), scale


KINDS: Final[Mapping[str, Callable[[RopeSpec, int], Frequencies]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
