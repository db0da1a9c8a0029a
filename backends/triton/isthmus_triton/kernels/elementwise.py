"""Gated activation, embedding and row gather."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus_triton.ahead import launching
from isthmus_triton.kernels.overlap import await_previous, let_next_begin, overlapping
from isthmus_triton.sizes import power_of_two, tiles_of

MOST_APART: Final = 512
"""Tokens up to which the gated activation has an output of its own."""


@triton.jit
def activated(x, SILU: tl.constexpr):
    """SiLU, or GELU by its tanh, of float32."""
    if SILU:
        y = x / (1.0 + tl.exp(-x))
    else:
        # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * u))
    return y


@triton.jit
def gated_activation_kernel(
    gate_up,  # [tokens, 2 * inner]
    out,  # [tokens, inner], rows out_stride apart; may be the first half of gate_up
    inner,
    out_stride,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    gate = tl.load(gate_up + token * 2 * inner + column, mask=mask, other=0.0)
    up = tl.load(gate_up + token * 2 * inner + inner + column, mask=mask, other=0.0)
    # Rounded where an unfused activation would round.
    product = activated(gate.to(tl.float32), SILU).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + token * out_stride + column, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather_rows_kernel(
    table,  # [rows, width]
    index,  # int32 [n]
    out,  # [n, width]
    width,
    scale,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    row = tl.load(index + n).to(tl.int64)
    value = tl.load(table + row * width + column, mask=mask, other=0.0)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(value.dtype)
    tl.store(out + n * width + column, value, mask=mask)


def gated_activation(gate_up: Tensor, activation: str, *, overlap: bool = False) -> Tensor:
    """``act(gate) * up`` from [tokens, 2 * inner], contiguous; "silu" or "gelu_tanh".

    Many tokens' products are written over the gates, and are a view of rows that lie apart.
    """
    assert activation in ("silu", "gelu_tanh"), activation
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    # In place where memory matters: a matrix library takes rows that lie apart.
    out = gate_up[:, :inner] if tokens > MOST_APART else gate_up.new_empty(tokens, inner)
    block = min(2048, power_of_two(inner))
    if tokens:
        launching(gated_activation_kernel, (tokens, tiles_of(inner, block)))(
            gate_up,
            out,
            inner,
            out.stride(0),
            BLOCK=block,
            SILU=activation == "silu",
            OVERLAP=overlap,
            num_warps=4,
            **overlapping(overlap),
        )
    return out


def gather_rows(table: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
    """``table[index] * scale`` for a contiguous ``table`` [rows, width]."""
    width = table.shape[1]
    out = table.new_empty(index.shape[0], width)
    block = min(2048, power_of_two(width))
    # The factor is rounded to the compute dtype first: checkpoints were trained that way.
    factor = 1.0 if scale == 1.0 else torch.tensor(scale, dtype=table.dtype).item()
    if index.shape[0]:
        launching(gather_rows_kernel, (index.shape[0], tiles_of(width, block)))(
            table, index, out, width, factor, BLOCK=block, SCALED=scale != 1.0, num_warps=4
        )
    return out
