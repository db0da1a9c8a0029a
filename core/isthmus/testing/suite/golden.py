"""What is right, in float64, and how near a device has to come to it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from isthmus.contract import AttentionSpec

TOLERANCE: Final = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 3e-2, "float8_e4m3fn": 7e-2}
"""Of an element's own size and of the largest there is: room for another order of sums, for products
in a dtype and for one rounding of the result, not for a missing term.  The last is of attention over a
cache in that dtype: one of its steps, where what is kept lies near the middle of two."""


def require_close(actual: Tensor, expected: Tensor, dtype: str, what: str) -> None:
    """``actual`` of the device against float64 ``expected``; says where it is farthest off."""
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: the shape is {tuple(actual.shape)}; it must be {tuple(expected.shape)}"
    )
    found = actual.detach().to("cpu").double()
    if not expected.numel():
        return
    assert bool(torch.isfinite(found).all()), f"{what}: {int((~torch.isfinite(found)).sum())} numbers are not finite"
    tolerance = TOLERANCE[dtype]
    allowed = tolerance * (expected.abs() + expected.abs().max())
    excess = (found - expected).abs() / allowed.clamp(min=1e-30)
    worst = int(excess.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    assert float(excess.flatten()[worst]) <= 1.0, (
        f"{what}: at {where} of {tuple(expected.shape)} it is {float(found.flatten()[worst]):.6g}; "
        f"it must be {float(expected.flatten()[worst]):.6g}, give or take {float(allowed.flatten()[worst]):.2g} "
        f"in {dtype}; {int((excess > 1).sum())} of {expected.numel()} are off"
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, rounded to ``dtype``, that are the same everywhere."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.double()


def eight_bits(x: Tensor) -> Tensor:
    """The nearest float8_e4m3fn, the largest one beyond its range."""
    return x.clamp(-448.0, 448.0).float().to(torch.float8_e4m3fn).double()


def activate(x: Tensor, activation: str) -> Tensor:
    x = x.double()
    if activation == "silu":
        return x * torch.sigmoid(x)
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """[tokens, heads, head_dim], half-split over the leading ``rotary_dim`` numbers of a head."""
    x = x.double()
    cos, sin = (part[:, None] for part in cos_sin.double()[positions.long()].chunk(2, -1))
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)


def attend(query: Tensor, keys: Tensor, values: Tensor, start: int, layer: AttentionSpec) -> Tensor:
    """One span [queries, heads, head_dim] at ``start`` over its row's keys [keys, kv_heads, head_dim]."""
    count, group = query.shape[0], layer.heads // layer.kv_heads
    keys, values = (part.double().repeat_interleave(group, 1).transpose(0, 1) for part in (keys, values))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * layer.scale  # [heads, queries, keys]
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    position = torch.arange(start, start + count)[:, None]
    key = torch.arange(keys.shape[1])[None, :]
    seen = key <= position
    if layer.window:
        seen &= key > position - layer.window
    attended = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ values
    return attended.transpose(0, 1).reshape(count, -1)
