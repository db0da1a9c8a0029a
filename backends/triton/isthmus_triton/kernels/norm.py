"""RMS norm, alone and with the residual sum before it: one program a row, one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from isthmus_triton.ahead import launching
from isthmus_triton.kernels.overlap import await_previous, let_next_begin, overlapping
from isthmus_triton.sizes import power_of_two


@triton.jit
def rms_norm_kernel(
    x,  # [rows, hidden]
    residual,  # [rows, hidden], overwritten with the sum
    weight,  # float32 [hidden]
    out,
    row_stride,
    hidden,
    epsilon,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < hidden
    w = tl.load(weight + column, mask=mask, other=0.0)
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    value = tl.load(x + row * row_stride + column, mask=mask, other=0.0)
    wide = value.to(tl.float32)
    if ADD:
        total = (wide + tl.load(residual + row * hidden + column, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(residual + row * hidden + column, total, mask=mask)
        wide = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + epsilon)
    tl.store(out + row * hidden + column, (wide * inverse * w).to(out.dtype.element_ty), mask=mask)


def _warps(columns: int) -> int:
    return 8 if columns >= 4096 else 4


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, overlap: bool = False) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension of ``x`` [..., hidden], contiguous."""
    hidden = x.shape[-1]
    flat = x.reshape(-1, hidden)
    result = x.new_empty(x.shape)
    columns = power_of_two(hidden)
    if flat.shape[0]:
        launching(rms_norm_kernel, (flat.shape[0],))(
            flat, flat, weight, result, flat.stride(0), hidden, epsilon,
            COLUMNS=columns, ADD=False, OVERLAP=overlap, num_warps=_warps(columns), **overlapping(overlap),
        )  # fmt: skip
    return result


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """``residual + x`` normed, written over ``x``, and the sum, written over ``residual``; both contiguous."""
    hidden = x.shape[-1]
    columns = power_of_two(hidden)
    if x.shape[0]:
        launching(rms_norm_kernel, (x.shape[0],))(
            x, residual, weight, x, x.stride(0), hidden, epsilon,
            COLUMNS=columns, ADD=True, OVERLAP=overlap, num_warps=_warps(columns), **overlapping(overlap),
        )  # fmt: skip
    return x, residual
