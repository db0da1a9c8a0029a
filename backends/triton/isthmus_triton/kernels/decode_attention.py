"""Attention of short spans (decode, draft verification) over a paged cache.

A fixed grid, whatever the lengths: each program walks its share of (span, key head, tile) work from
the plan.  A (span, head) that several programs share is merged by whichever of them arrives last;
programs never wait for each other, so nothing is assumed about which of them run at once.

The softmax over tiles is the online one of FlashAttention (Dao et al., 2022), the merge of partial
results that of Flash-Decoding (Dao et al., 2023), and the even dealing of tiles that of
LeanAttention (Sanovar et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus.contract import AttentionSpec
from isthmus_triton.ahead import launching
from isthmus_triton.kernels.overlap import await_previous, let_next_begin, overlapping
from isthmus_triton.kernels.plan import HEADER, SHARED_ROWS, PlanBuffers
from isthmus_triton.launch import DecodeLaunch
from isthmus_triton.sizes import power_of_two

LOWEST = tl.constexpr(-1e30)
FEW_PARTS = tl.constexpr(8)
"""Partial results that are merged one after another, for all query rows at once."""
LOG2E: float = 1.4426950408889634
_HEADER = tl.constexpr(HEADER)
_SHARED_ROWS = tl.constexpr(SHARED_ROWS)


@triton.jit
def key_slots(table, tile, limit, KEY_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block ids that hold tile ``tile``'s keys: one number where a block holds whole tiles, else one a key."""
    if BLOCK_SIZE >= KEY_TILE:
        blocks = tl.load(table + (tile * KEY_TILE) // BLOCK_SIZE, mask=tile * KEY_TILE < limit, other=0)
    else:
        position = tile * KEY_TILE + tl.arange(0, KEY_TILE)
        blocks = tl.load(table + position // BLOCK_SIZE, mask=position < limit, other=0)
    return blocks


@triton.jit
def key_offsets(blocks, tile, block_stride, KEY_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Element offsets [KEY_TILE] of the tile's keys within one head of the cache."""
    position = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    return blocks.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * HEAD_DIM


@triton.jit
def for_products(q, keys):
    """``q`` in the dtype in which it meets keys and values: float16 where those are 8-bit floats, since
    float16 holds them exactly and devices widen to it in one instruction."""
    if keys.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q


@triton.jit
def softcapped(scores, softcap):
    """``softcap * tanh(scores / softcap)``, by the exponential: no vendor's library."""
    turned = tl.exp(-2.0 * tl.abs(scores / softcap))
    capped = (1.0 - turned) / (1.0 + turned)
    return softcap * tl.where(scores < 0, -capped, capped)


@triton.jit
def await_stores(lane):
    """Wait until this warp's stores are done: the CDNA instruction, which every warp executes."""
    tl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [lane], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def merge_token(
    partial_out,
    partial_max,
    partial_sum,
    out,
    first_program,
    parts,
    starts_within,
    row,
    out_row,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    """The partial results of a query token's heads, ``MANY`` at a time so that their loads overlap."""
    dim = tl.arange(0, DIM)
    member = tl.arange(0, GROUP_TILE)
    acc = tl.zeros((GROUP_TILE, DIM), tl.float32)
    top = tl.full((GROUP_TILE,), LOWEST, tl.float32)
    total = tl.zeros((GROUP_TILE,), tl.float32)
    for first in range(0, parts, MANY):
        index = first + tl.arange(0, MANY)
        ok = (index < parts)[:, None] & (member < GROUP)[None, :]
        slot = 2 * (first_program + index) + tl.where((index == 0) & starts_within, 1, 0)
        part = slot.to(tl.int64)[:, None] * ROWS + row + member[None, :]
        tops = tl.load(partial_max + part, mask=ok, other=LOWEST, cache_modifier=".cg")
        totals = tl.load(partial_sum + part, mask=ok, other=0.0, cache_modifier=".cg")
        outs = tl.load(
            partial_out + part[:, :, None] * DIM + dim[None, None, :],
            mask=ok[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weight = tl.where(ok, tl.exp2(tops - new_top[None, :]), 0.0)
        mine = tl.exp2(top - new_top)
        acc = acc * mine[:, None] + tl.sum(outs * weight[:, :, None], 0)
        total = total * mine + tl.sum(totals * weight, 0)
        top = new_top
    result = acc / tl.maximum(total, 1e-30)[:, None]
    place = (out_row + member).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    ok = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=ok)


@triton.jit
def decode_kernel(
    query,  # [tokens, heads, head_dim]
    keys,  # [blocks, kv_heads, block_size, head_dim]
    values,
    out,  # [tokens, heads * head_dim]
    block_tables,
    programs,
    short_spans,
    partial_out,  # float32 [2 * programs, ROWS, HEAD_DIM]
    partial_max,  # float32 [2 * programs, ROWS], base 2
    partial_sum,
    arrivals,  # int32 [programs], zero between launches
    shared_out,  # see shared_attention
    shared_max,
    shared_sum,
    table_stride,
    kv_heads,
    block_stride,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    AWAIT_STORES: tl.constexpr = False,
    OVERLAP: tl.constexpr = False,
):
    program = tl.program_id(0)
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    per_program = tl.load(programs)
    all_work = tl.load(programs + 1)
    work = program * per_program
    start = programs + _HEADER + program * 4
    short = tl.load(start)
    head = tl.load(start + 1)
    tile_in = tl.load(start + 2)
    left = tl.minimum(per_program, all_work - work)
    pieces = 0
    if SHARED:
        shared_tiles = tl.load(programs + 4)
        splits = tl.load(programs + 5)
        row_tiles = tl.load(programs + 6)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    in_tile = tl.arange(0, KEY_TILE)
    dim_ok = dim < HEAD_DIM
    heads = kv_heads * GROUP

    while left > 0:
        entry = short_spans + short * 8
        context = tl.load(entry)
        first_token = tl.load(entry + 1)
        length = tl.load(entry + 2)
        table = block_tables + tl.load(entry + 3).to(tl.int64) * table_stride
        first_tile = tl.load(entry + 4)
        tiles_before = tl.load(entry + 5)
        tiles = tl.load(entry + 6)
        count = tl.minimum(tiles - tile_in, left)

        row_ok = row < length * GROUP
        token = first_token + row // GROUP
        query_at = (token * heads + head * GROUP + row % GROUP).to(tl.int64) * HEAD_DIM
        row_mask = row_ok[:, None] & dim_ok[None, :]
        q = for_products(tl.load(query + query_at[:, None] + dim[None, :], mask=row_mask, other=0.0), keys)
        query_position = context - length + row // GROUP

        acc = tl.zeros((ROWS, DIM), tl.float32)
        top = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        if SHARED:  # noqa: SIM102 (a constant of the compilation, and a number of the step)
            # Whoever takes a span's first own tile begins from what the shared keys gave.
            if (shared_tiles > 0) & (tile_in == 0):
                shared_row = short * GROUP + row
                for split in range(splits):
                    unit = (split * kv_heads + head) * row_tiles + shared_row // _SHARED_ROWS
                    part = unit.to(tl.int64) * _SHARED_ROWS + shared_row % _SHARED_ROWS
                    other_top = tl.load(shared_max + part, mask=row_ok, other=LOWEST)
                    other_total = tl.load(shared_sum + part, mask=row_ok, other=0.0)
                    other = tl.load(shared_out + part[:, None] * DIM + dim[None, :], mask=row_mask, other=0.0)
                    new_top = tl.maximum(top, other_top)
                    mine = tl.exp2(top - new_top)
                    theirs = tl.exp2(other_top - new_top)
                    acc = acc * mine[:, None] + other * theirs[:, None]
                    total = total * mine + other_total * theirs
                    top = new_top
        head_keys = keys + head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
        head_values = values + head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
        tile = first_tile + tile_in
        blocks = key_slots(table, tile, context, KEY_TILE, BLOCK_SIZE)
        # The next tile's block ids are carried in a variable: loaded within the iteration that uses
        # them, they would take pipeline stages from the keys and values.
        for step in tl.range(0, count, num_stages=STAGES):
            now = tile + step
            at = key_offsets(blocks, now, block_stride, KEY_TILE, BLOCK_SIZE, HEAD_DIM)
            blocks = key_slots(table, now + 1, context, KEY_TILE, BLOCK_SIZE)
            position = now * KEY_TILE + in_tile
            key_mask = (position < context)[:, None] & dim_ok[None, :]
            k = tl.load(head_keys + at[:, None] + dim[None, :], mask=key_mask, other=0.0)
            v = tl.load(head_values + at[:, None] + dim[None, :], mask=key_mask, other=0.0)
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                scores = softcapped(scores, softcap) * 1.4426950408889634
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

        if count == tiles:
            result = acc / tl.maximum(total, 1e-30)[:, None]
            tl.store(out + query_at[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=row_mask)
        else:
            begin = tiles_before * kv_heads + head * tiles
            first_program = begin // per_program
            last_program = (begin + tiles - 1) // per_program
            slot = 2 * program + tl.where(pieces == 0, 0, 1)
            part = slot.to(tl.int64) * ROWS + row
            tl.store(partial_out + part[:, None] * DIM + dim[None, :], acc, mask=row_mask)
            tl.store(partial_max + part, top, mask=row_ok)
            tl.store(partial_sum + part, total, mask=row_ok)
            # Every thread's stores come before the counter's release.
            if AWAIT_STORES:
                await_stores(row)
            tl.debug_barrier()
            parts = last_program - first_program + 1
            arrived = tl.atomic_add(arrivals + first_program, 1, sem="acq_rel")
            if arrived == parts - 1:
                starts_within = begin % per_program != 0
                if (MANY == 0) | (parts <= FEW_PARTS):
                    acc = tl.zeros((ROWS, DIM), tl.float32)
                    top = tl.full((ROWS,), LOWEST, tl.float32)
                    total = tl.zeros((ROWS,), tl.float32)
                    for index in tl.range(0, parts, loop_unroll_factor=4):
                        slot = 2 * (first_program + index) + tl.where((index == 0) & starts_within, 1, 0)
                        part = slot.to(tl.int64) * ROWS + row
                        places = part[:, None] * DIM + dim[None, :]
                        other_top = tl.load(partial_max + part, mask=row_ok, other=LOWEST, cache_modifier=".cg")
                        other_total = tl.load(partial_sum + part, mask=row_ok, other=0.0, cache_modifier=".cg")
                        other = tl.load(partial_out + places, mask=row_mask, other=0.0, cache_modifier=".cg")
                        new_top = tl.maximum(top, other_top)
                        mine = tl.exp2(top - new_top)
                        theirs = tl.exp2(other_top - new_top)
                        acc = acc * mine[:, None] + other * theirs[:, None]
                        total = total * mine + other_total * theirs
                        top = new_top
                    result = acc / tl.maximum(total, 1e-30)[:, None]
                    tl.store(out + query_at[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=row_mask)
                else:
                    if MANY > 0:
                        for one in range(length):
                            out_row = (first_token + one) * heads + head * GROUP
                            merge_token(
                                partial_out, partial_max, partial_sum, out, first_program, parts, starts_within,
                                one * GROUP, out_row, GROUP, GROUP_TILE, HEAD_DIM, DIM, ROWS, MANY,
                            )  # fmt: skip
                tl.store(arrivals + first_program, 0)

        left -= count
        pieces += 1
        tile_in = 0
        head += 1
        if head == kv_heads:
            head = 0
            short += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeScratch:
    """Partial results: at most two a program, so the size depends on the grid alone."""

    out: Tensor
    top: Tensor
    total: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, num_programs: int, rows: int, dim: int, device: torch.device) -> DecodeScratch:
        parts = 2 * num_programs * rows
        return cls(
            out=torch.empty(parts * dim, dtype=torch.float32, device=device),
            top=torch.empty(parts, dtype=torch.float32, device=device),
            total=torch.empty(parts, dtype=torch.float32, device=device),
            arrivals=torch.zeros(num_programs, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedScratch:
    """What the shared keys give to each query row, by unit of work."""

    out: Tensor  # float32 [units, SHARED_ROWS, dim]
    top: Tensor  # float32 [units, SHARED_ROWS], base 2
    total: Tensor

    @classmethod
    def allocate(cls, programs: int, max_spans: int, heads: int, dim: int, device: torch.device) -> SharedScratch:
        # Keys are split only where the units are then no more than the programs.
        rows = max(programs * SHARED_ROWS, (max_spans + SHARED_ROWS) * heads)
        return cls(
            out=torch.empty(rows * dim, dtype=torch.float32, device=device),
            top=torch.empty(rows, dtype=torch.float32, device=device),
            total=torch.empty(rows, dtype=torch.float32, device=device),
        )


def rows_for(group: int, longest: int) -> int:
    """Query rows a tile holds for spans of up to ``longest`` tokens."""
    return max(16, power_of_two(group * longest))


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    block_tables: Tensor,
    plan: PlanBuffers,
    scratch: DecodeScratch,
    layer: AttentionSpec,
    longest: int,
    launch: DecodeLaunch,
    shared: SharedScratch | None,
    *,
    overlap: bool = False,
) -> None:
    """Attend the plan's short spans, of at most ``longest`` tokens each; other tokens' ``out`` is left alone.

    With ``shared``, :func:`isthmus_triton.kernels.shared_attention.shared_attention` ran before.
    """
    group = layer.heads // layer.kv_heads
    capped = layer.softcap > 0.0
    dim = power_of_two(layer.head_dim)
    launching(decode_kernel, (plan.num_programs,))(
        query,
        keys,
        values,
        out,
        block_tables,
        plan.programs,
        plan.short_spans,
        scratch.out,
        scratch.top,
        scratch.total,
        scratch.arrivals,
        scratch.out if shared is None else shared.out,
        scratch.top if shared is None else shared.top,
        scratch.total if shared is None else shared.total,
        block_tables.stride(0),
        layer.kv_heads,
        keys.stride(0),
        layer.window,
        layer.scale if capped else layer.scale * LOG2E,
        layer.softcap,
        GROUP=group,
        GROUP_TILE=power_of_two(group),
        ROWS=rows_for(group, longest),
        HEAD_DIM=layer.head_dim,
        DIM=dim,
        MANY=max(1, launch.merged // (power_of_two(group) * dim)) if launch.merged else 0,
        BLOCK_SIZE=keys.shape[2],
        KEY_TILE=launch.key_tile,
        STAGES=launch.stages,
        HAS_WINDOW=layer.window > 0,
        HAS_SOFTCAP=capped,
        SHARED=shared is not None,
        PRECISION="ieee",
        AWAIT_STORES=launch.await_stores,
        OVERLAP=overlap,
        num_warps=launch.warps,
        **overlapping(overlap),
        **dict(launch.compiler),
    )
