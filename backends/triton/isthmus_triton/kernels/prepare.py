"""Input preparation: row starts and block appends, then a step's tokens, positions and slots."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_starts", "table_width"])
def start_rows_kernel(
    headers,  # int32 [starts, 4]: row, prompt tokens, first of its tokens in changes, number of tokens
    changes,
    tokens,  # int32 [rows, history]
    block_tables,
    num_prompt_tokens,
    num_starts,
    history_stride,
    table_stride,
    table_width,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    row = tl.load(headers + start * 4).to(tl.int64)
    offset = tl.load(headers + start * 4 + 2)
    length = tl.load(headers + start * 4 + 3)
    first = tl.program_id(1) * BLOCK
    step = tl.num_programs(1) * BLOCK
    for begin in range(first, length, step):
        index = begin + lane
        ok = index < length
        tl.store(tokens + row * history_stride + index, tl.load(changes + offset + index, mask=ok), mask=ok)
    for begin in range(first, table_width, step):
        index = begin + lane
        tl.store(block_tables + row * table_stride + index, 0, mask=index < table_width)
    if first == 0:
        tl.store(num_prompt_tokens + row, tl.load(headers + start * 4 + 1))


@triton.jit(do_not_specialize=["appends"])
def append_blocks_kernel(
    changes,  # int32 [3, appends]: rows, places, blocks
    block_tables,
    appends,
    table_stride,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < appends
    row = tl.load(changes + index, mask=ok, other=0).to(tl.int64)
    place = tl.load(changes + appends + index, mask=ok, other=0)
    block = tl.load(changes + 2 * appends + index, mask=ok, other=0)
    tl.store(block_tables + row * table_stride + place, block, mask=ok)


@triton.jit(do_not_specialize=["num_spans", "num_tokens"])
def build_kernel(
    span_rows,
    span_starts,
    query_starts,
    tokens,
    block_tables,
    token_ids,
    positions,
    slots,
    num_spans,
    num_tokens,
    history_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a span; one more for the tokens after the last span, which are padding."""
    span = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if span < num_spans:
        first = tl.load(query_starts + span)
        length = tl.load(query_starts + span + 1) - first
        row = tl.load(span_rows + span).to(tl.int64)
        start = tl.load(span_starts + span)
        for begin in range(0, length, BLOCK):
            index = begin + lane
            ok = index < length
            position = start + index
            token = tl.load(tokens + row * history_stride + position, mask=ok, other=0)
            block = tl.load(block_tables + row * table_stride + position // BLOCK_SIZE, mask=ok, other=0)
            tl.store(token_ids + first + index, token, mask=ok)
            tl.store(positions + first + index, position, mask=ok)
            tl.store(slots + first + index, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, mask=ok)
    else:
        for begin in range(tl.load(query_starts + num_spans), num_tokens, BLOCK):
            index = begin + lane
            ok = index < num_tokens
            zero = tl.zeros((BLOCK,), tl.int32)
            tl.store(token_ids + index, zero, mask=ok)
            tl.store(positions + index, zero, mask=ok)
            # The spare block takes what padding writes.
            tl.store(slots + index, (index % BLOCK_SIZE).to(tl.int64), mask=ok)
