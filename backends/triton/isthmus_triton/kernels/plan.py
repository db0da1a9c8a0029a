"""The device-side plan of a step's attention: one program, run once a step, read by every layer.

Short spans (decode, draft verification) are cut into tiles of keys, and the tiles are dealt evenly
to a fixed number of programs whatever the lengths are, so that one captured graph serves any of
them.  The order of work is (span, key head, tile).  Long spans become tiles of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus.contract import StepInputs
from isthmus_triton.ahead import launching
from isthmus_triton.sizes import power_of_two

HEADER: Final = 8
"""Ints before the per-program starts: work per program, all work, short spans, tiles of long spans;
then of the keys that all short spans share: tiles, splits, tiles of query rows, and a row that has them."""
SHARED_ROWS: Final = 128
"""Query rows (short span times group) that are attended to shared keys at once."""
_HEADER = tl.constexpr(HEADER)
MOST_PARTS = tl.constexpr(8)
_SHARED_ROWS = tl.constexpr(SHARED_ROWS)


@triton.jit
def shared_blocks(block_tables, table_stride, row, counts, limit, SPANS: tl.constexpr):
    """How many leading blocks, at most ``limit``, are the same in every row that ``counts``; and one such row."""
    MANY: tl.constexpr = 8
    one = tl.max(tl.where(counts, row, -1), 0)
    found = 0
    going = limit > 0
    while going:
        place = found + tl.arange(0, MANY)
        ok = place < limit
        theirs = tl.load(
            block_tables + row.to(tl.int64)[:, None] * table_stride + place[None, :],
            mask=counts[:, None] & ok[None, :],
            other=0,
        )
        its = tl.load(block_tables + one.to(tl.int64) * table_stride + place, mask=ok, other=0)
        differs = tl.max((counts[:, None] & (theirs != its[None, :])).to(tl.int32), 0)
        found = tl.min(tl.where(ok & (differs == 0), found + MANY, place), 0)
        going = (found % MANY == 0) & (found == tl.max(place, 0) + 1) & (found < limit)
    return found, one


@triton.jit(
    do_not_specialize=[
        "num_spans",
        "num_programs",
        "kv_heads",
        "window",
        "short_length",
        "least_tiles",
        "table_stride",
        "least_shared",
    ]
)
def plan_kernel(
    context_lengths,
    query_starts,
    span_rows,
    block_tables,
    programs,  # int32 [HEADER + 4 * num_programs]: header, then (short span, head, tile, -) a program
    short_spans,  # int32 [spans, 8]: context, first token, query length, row, first tile, tiles before, tiles, -
    long_tiles,  # int32 [spans + 1]: query tiles of long spans before each span
    long_lengths,  # int32 [spans]: tokens of a long span, 0 of another
    num_spans,
    num_programs,
    kv_heads,
    window,
    short_length,
    least_tiles,
    table_stride,
    shared_programs,
    least_shared,
    GROUP: tl.constexpr,
    KEY_TILE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    SPANS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARE: tl.constexpr,
):
    span = tl.arange(0, SPANS)
    here = span < num_spans
    context = tl.load(context_lengths + span, mask=here, other=0)
    first_token = tl.load(query_starts + span, mask=here, other=0)
    end_token = tl.load(query_starts + span + 1, mask=here, other=0)
    row = tl.load(span_rows + span, mask=here, other=0)
    length = end_token - first_token

    is_long = length > short_length
    query_tiles = tl.where(is_long, (length * GROUP + QUERY_TILE - 1) // QUERY_TILE, 0)
    tl.store(long_tiles + 1 + span, tl.cumsum(query_tiles, 0), mask=here)
    tl.store(long_tiles, 0)
    tl.store(long_lengths + span, tl.where(is_long, length, 0), mask=here)
    tl.store(programs + 3, tl.sum(query_tiles, 0))

    is_short = (length > 0) & (length <= short_length)
    first_key = tl.where(window > 0, tl.maximum(context - length - window + 1, 0), 0)
    first_tile = first_key // KEY_TILE
    num_short = tl.sum(is_short.to(tl.int32), 0)
    shared_tiles = 0
    if SHARE:
        # Blocks that hold none of the spans' own tokens, and one query each.
        limit = tl.min(tl.where(is_short, (context - length) // BLOCK_SIZE, 0x7FFFFFFF), 0)
        limit = tl.where((num_short > 1) & (tl.max(tl.where(is_short, length, 0), 0) == 1), limit, 0)
        blocks, one = shared_blocks(block_tables, table_stride, row, is_short, limit, SPANS)
        shared_tiles = blocks * BLOCK_SIZE // KEY_TILE
        shared_tiles = tl.where(shared_tiles * num_short >= least_shared, shared_tiles, 0)
        row_tiles = (num_short * GROUP + _SHARED_ROWS - 1) // _SHARED_ROWS
        splits = tl.maximum(1, tl.minimum(shared_tiles, shared_programs // tl.maximum(row_tiles * kv_heads, 1)))
        tl.store(programs + 5, splits)
        tl.store(programs + 6, row_tiles)
        tl.store(programs + 7, one)
        first_tile = tl.maximum(first_tile, shared_tiles)
    tl.store(programs + 4, shared_tiles)
    tiles = tl.where(is_short, (context + KEY_TILE - 1) // KEY_TILE - first_tile, 0)
    place = tl.cumsum(is_short.to(tl.int32), 0) - 1
    tiles_after = tl.cumsum(tiles, 0)
    entry = short_spans + place * 8
    tl.store(entry + 0, context, mask=is_short)
    tl.store(entry + 1, first_token, mask=is_short)
    tl.store(entry + 2, length, mask=is_short)
    tl.store(entry + 3, row, mask=is_short)
    tl.store(entry + 4, first_tile, mask=is_short)
    tl.store(entry + 5, tiles_after - tiles, mask=is_short)
    tl.store(entry + 6, tiles, mask=is_short)

    all_work = tl.sum(tiles, 0) * kv_heads
    # A few partial results a span cost less than the keys they let be read at once; many cost more.
    few_parts = (tl.max(tiles, 0) + MOST_PARTS - 1) // MOST_PARTS
    per_program = tl.maximum((all_work + num_programs - 1) // num_programs, tl.minimum(few_parts, least_tiles))
    per_program = tl.maximum(per_program, 1)
    tl.store(programs + 0, per_program)
    tl.store(programs + 1, all_work)
    tl.store(programs + 2, num_short)
    tl.debug_barrier()

    # The last short span whose tiles begin at or before this program's work.
    program = tl.arange(0, PROGRAMS)
    work = program * per_program
    low = tl.zeros((PROGRAMS,), tl.int32)
    high = tl.zeros((PROGRAMS,), tl.int32) + num_short
    for _ in range(SEARCH):
        middle = (low + high) // 2
        apart = high - low > 1
        before = tl.load(short_spans + middle * 8 + 5, mask=apart, other=0) * kv_heads
        reached = before <= work
        low = tl.where(apart & reached, middle, low)
        high = tl.where(apart & (reached == 0), middle, high)
    busy = (program < num_programs) & (work < all_work)
    before = tl.load(short_spans + low * 8 + 5, mask=busy, other=0)
    count = tl.load(short_spans + low * 8 + 6, mask=busy, other=1)
    within = work - before * kv_heads
    start = programs + _HEADER + program * 4
    tl.store(start + 0, low, mask=program < num_programs)
    tl.store(start + 1, within // count, mask=busy)
    tl.store(start + 2, within % count, mask=busy)


FEW_SPANS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBuffers:
    """Device memory of a plan, allocated once and written each step."""

    programs: Tensor  # int32 [HEADER + 4 * num_programs]
    short_spans: Tensor  # int32 [max_spans, 8]
    long_tiles: Tensor  # int32 [max_spans + 1]
    long_lengths: Tensor  # int32 [max_spans]
    num_programs: int
    shared_programs: int

    @classmethod
    def allocate(cls, num_programs: int, shared_programs: int, max_spans: int, device: torch.device) -> PlanBuffers:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            programs=zeros(HEADER + 4 * num_programs),
            short_spans=zeros(max_spans, 8),
            long_tiles=zeros(max_spans + 1),
            long_lengths=zeros(max_spans),
            num_programs=num_programs,
            shared_programs=shared_programs,
        )


def make_plan(
    buffers: PlanBuffers,
    inputs: StepInputs,
    *,
    kv_heads: int,
    group: int,
    window: int,
    key_tile: int,
    query_tile: int,
    short_length: int,
    least_tiles: int,
    block_size: int,
    share: bool,
    least_shared: int,
) -> None:
    """Write ``buffers`` for the spans of ``inputs``; with ``share``, keys that all short spans share are set apart."""
    # Two sizes alone, so that few variants are compiled.
    most = buffers.short_spans.shape[0]
    spans = power_of_two(most) if inputs.num_spans > FEW_SPANS else FEW_SPANS
    launching(plan_kernel, (1,))(
        inputs.context_lengths,
        inputs.query_starts,
        inputs.span_rows,
        inputs.block_tables,
        buffers.programs,
        buffers.short_spans,
        buffers.long_tiles,
        buffers.long_lengths,
        inputs.num_spans,
        buffers.num_programs,
        kv_heads,
        window,
        short_length,
        least_tiles,
        inputs.block_tables.stride(0),
        buffers.shared_programs,
        least_shared,
        GROUP=group,
        KEY_TILE=key_tile,
        QUERY_TILE=query_tile,
        SPANS=spans,
        PROGRAMS=power_of_two(buffers.num_programs),
        SEARCH=spans.bit_length(),
        BLOCK_SIZE=block_size,
        SHARE=share,
        num_warps=8,
    )
