"""Whether the cuts keep a row's candidate, and the next one where they do not: all processors on the few rows left.

Each round works through a queue of rows, by slices.  The program that ends a row's last slice decides
for the row, and queues it for the next round if its candidate is refused.  Round 0 only checks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isthmus_triton.kernels.adjust import float_parameter, parameter
from isthmus_triton.kernels.decode_attention import await_stores
from isthmus_triton.kernels.noise import row_key
from isthmus_triton.kernels.overlap import await_previous, let_next_begin
from isthmus_triton.kernels.sample import (
    _LOG_MIN_P,
    _SEED,
    _TOP_P,
    ABOVE,
    ARRIVALS,
    CHOSEN,
    FOUND,
    KEPT_OR_SCORE,
    REFUSED,
    ROW_WORDS,
    SLICE_NUMBERS,
    STATUS,
    inverse_temperature,
    lowest_at,
    raise_best,
    row_best,
)


@triton.jit
def round_kernel(
    logits,
    slices,
    slice_ids,
    row_words,
    row_bounds,  # float32 [samples, 2]: a queued row's largest logit over temperature, and the mass that top_p asks for
    queued,
    queue,
    row_parameters,
    sample_rows,
    sample_tokens,
    positions,
    token_keys,  # int32 [vocab]
    vocab,
    num_slices,
    ROUND: tl.constexpr,
    QUEUES: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    AWAIT_STORES: tl.constexpr = False,
    OVERLAP: tl.constexpr = False,
):
    """Any number of programs; each takes slices of the rows that are queued for ``ROUND``, none if there are none."""
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    lane = tl.arange(0, BLOCK)
    items = tl.load(queued + ROUND, cache_modifier=".cg") * num_slices
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        sample = tl.load(queue + item // num_slices * QUEUES + ROUND, cache_modifier=".cg").to(tl.int64)
        piece = item % num_slices
        row = tl.load(sample_rows + sample).to(tl.int64)
        words = row_words + sample * ROW_WORDS
        bounds = row_bounds + sample * 2
        if ROUND == 0:
            chosen, top = row_best(slices, slice_ids, sample, num_slices, SLICES)
            valid = (top > float("-inf")) & (top < float("inf"))
            top = tl.where(valid, top, 0.0)
        else:
            chosen = tl.load(words + CHOSEN, cache_modifier=".cg")
            top = tl.load(bounds, cache_modifier=".cg")
        x = logits + sample * vocab
        inverse = inverse_temperature(row_parameters, row)
        candidate = tl.load(x + chosen) * inverse
        top_p = float_parameter(row_parameters, row, _TOP_P)
        floor = top + float_parameter(row_parameters, row, _LOG_MIN_P)
        first = piece * SLICE
        at = sample * num_slices + piece
        above = tl.zeros((BLOCK,), tl.float32)
        if ROUND == 0:
            kept = tl.zeros((BLOCK,), tl.float32)
            # Without top_p the floor alone decides.
            end = tl.where(valid & (top_p < 1.0), first + SLICE, first)
            for begin in range(first, end, BLOCK):
                token = begin + lane
                values = tl.load(x + token, mask=token < vocab, other=float("-inf")) * inverse
                mass = tl.where(values >= floor, tl.exp(values - top), 0.0)
                kept += mass
                above += tl.where(values > candidate, mass, 0.0)
            tl.store(slices + at * SLICE_NUMBERS + KEPT_OR_SCORE, tl.sum(kept, 0))
        else:
            position = tl.load(positions + tl.load(sample_tokens + sample)) + 1
            key = row_key(parameter(row_parameters, row, _SEED), position)
            best = tl.full((), float("-inf"), tl.float32)
            best_id = tl.full((), 0x7FFFFFFF, tl.int32)
            for begin in range(first, first + SLICE, BLOCK):
                token = begin + lane
                ok = token < vocab
                values = tl.load(x + token, mask=ok, other=float("-inf")) * inverse
                values = tl.where((values >= floor) & (values > candidate), values, float("-inf"))
                above += tl.exp(values - top)
                best, best_id = raise_best(best, best_id, values, key, token_keys, token, ok)
            tl.store(slices + at * SLICE_NUMBERS + KEPT_OR_SCORE, best)
            tl.store(slice_ids + at * 2 + 1, best_id)
        tl.store(slices + at * SLICE_NUMBERS + ABOVE, tl.sum(above, 0))
        # All threads have read what the last program writes, and written what it reads.
        if AWAIT_STORES:
            await_stores(lane)
        tl.debug_barrier()
        arrived = tl.atomic_add(words + ARRIVALS, 1, sem="acq_rel")
        if arrived == num_slices - 1:
            tl.store(words + ARRIVALS, 0)
            other = tl.arange(0, SLICES)
            ok = other < num_slices
            numbers = slices + (sample * num_slices + other) * SLICE_NUMBERS
            mass_above = tl.sum(tl.load(numbers + ABOVE, mask=ok, other=0.0, cache_modifier=".cg"), 0)
            if ROUND == 0:
                masses = tl.load(numbers + KEPT_OR_SCORE, mask=ok, other=0.0, cache_modifier=".cg")
                most_above = top_p * tl.sum(masses, 0)
                tl.store(bounds, top)
                tl.store(bounds + 1, most_above)
            else:
                most_above = tl.load(bounds + 1, cache_modifier=".cg")
            stays = (candidate >= floor) & ((top_p == 1.0) | (mass_above < most_above))
            if ROUND == 0:
                refused = valid & (stays == 0)
                if refused:
                    tl.store(words + CHOSEN, chosen)
                    tl.store(words + STATUS, REFUSED)
            else:
                refused = (stays == 0) & (top_p < 1.0)
                if stays == 0:
                    scores = tl.load(numbers + KEPT_OR_SCORE, mask=ok, other=float("-inf"), cache_modifier=".cg")
                    places = slice_ids + (sample * num_slices + other) * 2 + 1
                    ids = tl.load(places, mask=ok, other=0x7FFFFFFF, cache_modifier=".cg")
                    tl.store(words + CHOSEN, tl.minimum(lowest_at(scores, tl.max(scores, 0), ids), vocab - 1))
                tl.store(words + STATUS, tl.where(refused, REFUSED, FOUND))
            if refused & (ROUND + 1 < QUEUES):
                place = tl.atomic_add(queued + ROUND + 1, 1, sem="relaxed")
                tl.store(queue + place * QUEUES + ROUND + 1, sample.to(tl.int32))
