"""Query and key norm, rotary embedding and the write to the cache, in one pass over the raw projections."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from isthmus.contract import AttentionSpec, QkNorm, RotarySpec, StepInputs
from isthmus_triton.ahead import launching
from isthmus_triton.kernels.overlap import await_previous, let_next_begin, overlapping
from isthmus_triton.sizes import power_of_two, tiles_of


@triton.jit
def kept_in(cache, x):
    """``x`` in the cache's dtype.  Beyond an 8-bit float's range it becomes the largest one; a NaN stays one."""
    if cache.dtype.element_ty == tl.float8e4nv:
        x = x.to(tl.float32)
        x = tl.minimum(x, 448.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)


@triton.jit
def rotate_and_store_kernel(
    qkv,  # [tokens, heads + 2 * kv_heads, head_dim]
    query_out,  # [tokens, heads, head_dim]
    keys,  # [blocks, kv_heads, block_size, head_dim]
    values,
    cos_sin,  # float32 [positions, rotary_dim]
    query_weight,
    key_weight,
    positions,
    slots,
    heads,
    kv_heads,
    block_stride,
    epsilon,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    QK_NORM: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH)
    dim = tl.arange(0, DIM)
    all_heads = heads + 2 * kv_heads
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(dim < half, dim + half, tl.where(dim < ROTARY, dim - half, dim))
    mask = (head < all_heads)[:, None] & (dim < HEAD_DIM)[None, :]

    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token)
    base = qkv + token * all_heads * HEAD_DIM + head[:, None] * HEAD_DIM
    mine = tl.load(base + dim[None, :], mask=mask, other=0.0)
    x = mine.to(tl.float32)
    other = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)

    angle = tl.where(dim < half, dim, dim - half)
    turned = dim < ROTARY
    cos = tl.load(cos_sin + position * ROTARY + angle, mask=turned, other=1.0)
    sin = tl.load(cos_sin + position * ROTARY + half + angle, mask=turned, other=0.0)
    sin = tl.where(dim < half, -sin, sin)

    is_query = head < heads
    is_key = (head >= heads) & (head < heads + kv_heads)
    is_value = (head >= heads + kv_heads) & (head < all_heads)
    if QK_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + epsilon)
        ok = dim < HEAD_DIM
        weight = tl.where(
            is_query[:, None],
            tl.load(query_weight + dim, mask=ok, other=0.0)[None, :],
            tl.load(key_weight + dim, mask=ok, other=0.0)[None, :],
        )
        other_weight = tl.where(
            is_query[:, None],
            tl.load(query_weight + partner, mask=ok, other=0.0)[None, :],
            tl.load(key_weight + partner, mask=ok, other=0.0)[None, :],
        )
        # Rounded where an unfused norm would round.
        x = (x * inverse[:, None] * weight).to(mine.dtype).to(tl.float32)
        other = (other * inverse[:, None] * other_weight).to(mine.dtype).to(tl.float32)
    rotated = (x * cos[None, :] + other * sin[None, :]).to(mine.dtype)

    tl.store(
        query_out + token * heads * HEAD_DIM + head[:, None] * HEAD_DIM + dim[None, :],
        rotated,
        mask=mask & is_query[:, None],
    )
    place = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
    key_head = (head - heads)[:, None]
    value_head = (head - heads - kv_heads)[:, None]
    head_stride: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    tl.store(keys + place + key_head * head_stride + dim[None, :], kept_in(keys, rotated), mask=mask & is_key[:, None])
    tl.store(
        values + place + value_head * head_stride + dim[None, :], kept_in(values, mine), mask=mask & is_value[:, None]
    )


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: AttentionSpec,
    rotary: RotarySpec,
    qk_norm: QkNorm | None,
    inputs: StepInputs,
    heads_each: int,
    *,
    overlap: bool = False,
) -> Tensor:
    """Queries [tokens, heads, head_dim]; keys and values go to ``inputs.slots``."""
    tokens = qkv.shape[0]
    query = qkv.new_empty(tokens, layer.heads, layer.head_dim)
    all_heads = layer.heads + 2 * layer.kv_heads
    launching(rotate_and_store_kernel, (tokens, tiles_of(all_heads, heads_each)))(
        qkv,
        query,
        keys,
        values,
        rotary.cos_sin,
        rotary.cos_sin if qk_norm is None else qk_norm.query_weight,
        rotary.cos_sin if qk_norm is None else qk_norm.key_weight,
        inputs.positions,
        inputs.slots,
        layer.heads,
        layer.kv_heads,
        keys.stride(0),
        0.0 if qk_norm is None else qk_norm.epsilon,
        HEAD_DIM=layer.head_dim,
        DIM=power_of_two(layer.head_dim),
        ROTARY=rotary.rotary_dim,
        BLOCK_SIZE=keys.shape[2],
        HEADS_EACH=heads_each,
        QK_NORM=qk_norm is not None,
        OVERLAP=overlap,
        num_warps=4,
        **overlapping(overlap),
    )
    return query
