"""Attention of all short spans' queries to the keys that they all share, which are then read once.

The plan finds the blocks at the beginning of every short span's table.  Query rows of all spans are
packed into tiles, as a long span's are, and nothing needs a mask: shared keys come before every
query.  The decode kernel goes on from these partial results (Hydragen, Juravsky et al., 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from isthmus.contract import AttentionSpec
from isthmus_triton.ahead import launching
from isthmus_triton.kernels.decode_attention import LOG2E, LOWEST, SharedScratch, for_products
from isthmus_triton.kernels.plan import SHARED_ROWS, PlanBuffers
from isthmus_triton.kernels.prefill_attention import attend_tiles
from isthmus_triton.launch import DecodeLaunch, PrefillLaunch
from isthmus_triton.sizes import power_of_two

_SHARED_ROWS = tl.constexpr(SHARED_ROWS)


@triton.jit
def shared_kernel(
    query,  # [tokens, heads, head_dim]
    keys,
    values,
    block_tables,
    programs,
    short_spans,
    shared_out,
    shared_max,
    shared_sum,
    table_stride,
    kv_heads,
    block_stride,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    shared_tiles = tl.load(programs + 4)
    if shared_tiles > 0:
        num_short = tl.load(programs + 2)
        splits = tl.load(programs + 5)
        row_tiles = tl.load(programs + 6)
        table = block_tables + tl.load(programs + 7).to(tl.int64) * table_stride
        share = tl.cdiv(shared_tiles, splits)
        context = shared_tiles * KEY_TILE
        dim = tl.arange(0, DIM)
        for unit in range(tl.program_id(0), row_tiles * kv_heads * splits, tl.num_programs(0)):
            head = (unit // row_tiles) % kv_heads
            first = (unit // (row_tiles * kv_heads)) * share
            end = tl.minimum(first + share, shared_tiles)
            row = (unit % row_tiles) * _SHARED_ROWS + tl.arange(0, _SHARED_ROWS)
            row_ok = row < num_short * GROUP
            token = tl.load(short_spans + (row // GROUP) * 8 + 1, mask=row_ok, other=0)
            query_at = (token * kv_heads * GROUP + head * GROUP + row % GROUP).to(tl.int64) * HEAD_DIM
            row_mask = row_ok[:, None] & (dim < HEAD_DIM)[None, :]
            q = for_products(tl.load(query + query_at[:, None] + dim[None, :], mask=row_mask, other=0.0), keys)
            acc = tl.zeros((_SHARED_ROWS, DIM), tl.float32)
            top = tl.full((_SHARED_ROWS,), LOWEST, tl.float32)
            total = tl.zeros((_SHARED_ROWS,), tl.float32)
            head_keys = keys + head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
            head_values = values + head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
            acc, top, total = attend_tiles(
                q, acc, top, total, head_keys, head_values, table, first, end, context, row,
                block_stride, 0, scale, softcap, HEAD_DIM, DIM, BLOCK_SIZE, KEY_TILE, STAGES, False, False,
                HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
            part = unit * _SHARED_ROWS + tl.arange(0, _SHARED_ROWS)
            tl.store(shared_out + part[:, None] * DIM + dim[None, :], acc)
            tl.store(shared_max + part, top)
            tl.store(shared_sum + part, total)


def shared_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    plan: PlanBuffers,
    scratch: SharedScratch,
    layer: AttentionSpec,
    decode: DecodeLaunch,
    launch: PrefillLaunch,
) -> None:
    """Write what the plan's shared keys give; ends at once where there are none."""
    capped = layer.softcap > 0.0
    launching(shared_kernel, (plan.shared_programs,))(
        query,
        keys,
        values,
        block_tables,
        plan.programs,
        plan.short_spans,
        scratch.out,
        scratch.top,
        scratch.total,
        block_tables.stride(0),
        layer.kv_heads,
        keys.stride(0),
        layer.scale if capped else layer.scale * LOG2E,
        layer.softcap,
        GROUP=layer.heads // layer.kv_heads,
        HEAD_DIM=layer.head_dim,
        DIM=power_of_two(layer.head_dim),
        BLOCK_SIZE=keys.shape[2],
        KEY_TILE=decode.key_tile,
        STAGES=launch.stages,
        HAS_SOFTCAP=capped,
        PRECISION="ieee",
        num_warps=launch.warps,
        **dict(launch.compiler),
    )
