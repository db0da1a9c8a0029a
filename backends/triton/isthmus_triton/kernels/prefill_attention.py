"""Attention of long spans over a paged cache: tiles of queries, each over just the keys it can see.

The query heads that share a key head are packed into one tile's rows, (token, head in group), so
that one read of keys and values serves all of them.  The softmax over tiles of keys is the online
one of FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from isthmus.contract import AttentionSpec, StepInputs
from isthmus_triton.ahead import launching
from isthmus_triton.kernels.decode_attention import LOG2E, LOWEST, for_products, key_offsets, key_slots, softcapped
from isthmus_triton.kernels.plan import PlanBuffers
from isthmus_triton.launch import PrefillLaunch
from isthmus_triton.sizes import power_of_two


@triton.jit
def attend_tiles(
    q,
    acc,
    top,
    total,
    keys,
    values,
    table,
    first,
    end,
    context,
    query_position,
    block_stride,
    window,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles ``first ... end - 1`` of keys; only ``MASKED`` ones may hold keys that some row does not see."""
    dim = tl.arange(0, DIM)
    in_tile = tl.arange(0, KEY_TILE)
    blocks = key_slots(table, first, context, KEY_TILE, BLOCK_SIZE)
    for tile in tl.range(first, end, num_stages=STAGES):
        at = key_offsets(blocks, tile, block_stride, KEY_TILE, BLOCK_SIZE, HEAD_DIM)
        blocks = key_slots(table, tile + 1, context, KEY_TILE, BLOCK_SIZE)
        position = tile * KEY_TILE + in_tile
        places = at[:, None] + dim[None, :]
        if MASKED:
            key_mask = (position < context)[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(keys + places, mask=key_mask, other=0.0)
            v = tl.load(values + places, mask=key_mask, other=0.0)
        elif HEAD_DIM != DIM:
            k = tl.load(keys + places, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(values + places, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys + places)
            v = tl.load(values + places)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if HAS_SOFTCAP:  # noqa: SIM108
            scores = softcapped(scores * scale, softcap) * 1.4426950408889634
        else:
            scores = scores * scale
        if MASKED:
            seen = position[None, :] <= query_position[:, None]
            if HAS_WINDOW:
                seen = seen & (position[None, :] > query_position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["num_spans", "window"])
def prefill_kernel(
    query,  # [tokens, heads, head_dim]
    keys,  # [blocks, kv_heads, block_size, head_dim]
    values,
    out,  # [tokens, heads * head_dim]
    context_lengths,
    query_starts,
    span_rows,
    block_tables,
    programs,
    long_tiles,
    num_spans,
    table_stride,
    kv_heads,
    block_stride,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    all_tiles = tl.load(programs + 3)
    # The last tiles of a span see the most keys: begin with them.
    index = all_tiles - 1 - tl.program_id(0)
    head = tl.program_id(1)
    if index >= 0:
        low = 0
        high = num_spans
        while high - low > 1:
            middle = (low + high) // 2
            reached = tl.load(long_tiles + middle) <= index
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        context = tl.load(context_lengths + low)
        first_token = tl.load(query_starts + low)
        length = tl.load(query_starts + low + 1) - first_token
        table = block_tables + tl.load(span_rows + low).to(tl.int64) * table_stride
        first_row = (index - tl.load(long_tiles + low)) * QUERY_TILE
        start = context - length

        row = first_row + tl.arange(0, QUERY_TILE)
        dim = tl.arange(0, DIM)
        heads = kv_heads * GROUP
        query_at = ((first_token + row // GROUP) * heads + head * GROUP + row % GROUP).to(tl.int64) * HEAD_DIM
        row_mask = (row < length * GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        q = for_products(tl.load(query + query_at[:, None] + dim[None, :], mask=row_mask, other=0.0), keys)
        query_position = start + row // GROUP
        low_position = start + first_row // GROUP
        high_position = tl.minimum(start + (first_row + QUERY_TILE - 1) // GROUP, context - 1)

        acc = tl.zeros((QUERY_TILE, DIM), tl.float32)
        top = tl.full((QUERY_TILE,), LOWEST, tl.float32)
        total = tl.zeros((QUERY_TILE,), tl.float32)
        head_keys = keys + head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
        head_values = values + head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
        end = high_position // KEY_TILE + 1
        if HAS_WINDOW:
            first = tl.maximum(low_position - window + 1, 0) // KEY_TILE
            seen_by_all = first
        else:
            first = 0
            seen_by_all = (low_position + 1) // KEY_TILE
        acc, top, total = attend_tiles(
            q, acc, top, total, head_keys, head_values, table, first, seen_by_all, context, query_position,
            block_stride, window, scale, softcap, HEAD_DIM, DIM, BLOCK_SIZE, KEY_TILE, STAGES, False, False,
            HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        acc, top, total = attend_tiles(
            q, acc, top, total, head_keys, head_values, table, seen_by_all, end, context, query_position,
            block_stride, window, scale, softcap, HEAD_DIM, DIM, BLOCK_SIZE, KEY_TILE, STAGES, True, HAS_WINDOW,
            HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        result = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + query_at[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=row_mask)


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    plan: PlanBuffers,
    inputs: StepInputs,
    layer: AttentionSpec,
    launch: PrefillLaunch,
) -> None:
    """Attend the plan's long spans; other tokens' ``out`` is left alone."""
    group = layer.heads // layer.kv_heads
    capped = layer.softcap > 0.0
    # A bound that needs no lengths; programs past the last tile end at once.
    most_tiles = inputs.num_tokens * group // launch.query_tile + inputs.num_spans
    launching(prefill_kernel, (most_tiles, layer.kv_heads))(
        query,
        keys,
        values,
        out,
        inputs.context_lengths,
        inputs.query_starts,
        inputs.span_rows,
        inputs.block_tables,
        plan.programs,
        plan.long_tiles,
        inputs.num_spans,
        inputs.block_tables.stride(0),
        layer.kv_heads,
        keys.stride(0),
        layer.window,
        layer.scale if capped else layer.scale * LOG2E,
        layer.softcap,
        GROUP=group,
        QUERY_TILE=launch.query_tile,
        HEAD_DIM=layer.head_dim,
        DIM=power_of_two(layer.head_dim),
        BLOCK_SIZE=keys.shape[2],
        KEY_TILE=launch.key_tile,
        STAGES=launch.stages,
        HAS_WINDOW=layer.window > 0,
        HAS_SOFTCAP=capped,
        PRECISION="ieee",
        num_warps=launch.warps,
        **dict(launch.compiler),
    )
