"""Logits to tokens without a sort and without waiting for the host: see ``isthmus.reference.cut``.

The draw is Gumbel-max over the tokens that the cuts keep, and a cut is a threshold.  So the largest
perturbed token of the whole row is the answer if the cuts keep it; if they do not, they keep no
token of its logit or less either, and the largest perturbed one above it is the next to try.  One
sweep checks a candidate (the mass above it) and finds the next.  ``top_k`` finds its threshold by a
radix select first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isthmus_triton.kernels.adjust import float_parameter, is_bad, parameter
from isthmus_triton.kernels.noise import gumbel, row_key
from isthmus_triton.row_parameters import LOG_MIN_P, SEED, TEMPERATURE, TOP_K, TOP_P

_TEMPERATURE = tl.constexpr(TEMPERATURE)
_TOP_K = tl.constexpr(TOP_K)
_TOP_P = tl.constexpr(TOP_P)
_LOG_MIN_P = tl.constexpr(LOG_MIN_P)
_SEED = tl.constexpr(SEED)


@triton.jit
def lowest_at(values, best, tokens):
    """The lowest of ``tokens`` whose value is ``best``."""
    return tl.min(tl.where(values == best, tokens, 0x7FFFFFFF), 0)


@triton.jit
def slices_kernel(
    logits,  # float32 [samples, vocab]
    slice_best,  # float32 [samples, slices, 2]: best score, its logit over temperature
    slice_top,  # float32 [samples, slices]: largest logit over temperature; infinite if one is a NaN
    slice_ids,  # int32 [samples, slices]: the best score's token
    row_parameters,
    sample_rows,
    sample_tokens,
    positions,
    vocab,
    slice_size,
    BLOCK: tl.constexpr,
):
    """The best token of each slice of each row: the likeliest, or the largest perturbed one."""
    sample = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.load(sample_rows + sample).to(tl.int64)
    temperature = float_parameter(row_parameters, row, _TEMPERATURE)
    x = logits + sample.to(tl.int64) * vocab
    first = piece * slice_size
    end = tl.minimum(first + slice_size, vocab)
    lane = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    best_x = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32) + first
    bad = tl.full((), 0, tl.int32)
    if temperature == 0.0:
        for begin in range(first, end, BLOCK):
            token = begin + lane
            values = tl.load(x + token, mask=token < end, other=float("-inf"))
            bad = tl.maximum(bad, is_bad(values))
            here = tl.max(values, 0)
            here_id = lowest_at(values, here, token)
            best_id = tl.where(here > best, here_id, best_id)
            best = tl.maximum(best, here)
        top = best
        best_x = best
    else:
        position = tl.load(positions + tl.load(sample_tokens + sample)) + 1
        key = row_key(parameter(row_parameters, row, _SEED), position)
        for begin in range(first, end, BLOCK):
            token = begin + lane
            values = tl.load(x + token, mask=token < end, other=float("-inf")) / temperature
            bad = tl.maximum(bad, is_bad(values))
            top = tl.maximum(top, tl.max(values, 0))
            score = values + gumbel(key, token)
            here = tl.max(score, 0)
            here_id = lowest_at(score, here, token)
            here_x = tl.max(tl.where(token == here_id, values, float("-inf")), 0)
            better = here > best
            best_id = tl.where(better, here_id, best_id)
            best_x = tl.where(better, here_x, best_x)
            best = tl.maximum(best, here)
    at = sample.to(tl.int64) * tl.num_programs(1) + piece
    tl.store(slice_best + at * 2, best)
    tl.store(slice_best + at * 2 + 1, best_x)
    tl.store(slice_top + at, tl.where(bad != 0, float("inf"), top))
    tl.store(slice_ids + at, best_id)


@triton.jit
def ordered(values):
    """uint32 in the order of the floats."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def radix_level(
    x,
    temperature,
    vocab,
    left,
    prefix,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Among keys that begin as ``prefix`` does, the digit of the ``left``-th largest; what is left within it."""
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, 2048)
    counts = tl.zeros((2048,), tl.int32)
    for begin in range(0, vocab, BLOCK):
        token = begin + lane
        ok = token < vocab
        key = ordered(tl.load(x + token, mask=ok, other=float("-inf")) / temperature)
        if not FIRST:
            ok = ok & ((key >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS)))
        digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counts += tl.histogram(digit, 2048, mask=ok)
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.max(tl.where(at_least >= left, bins, 0), 0)
    left -= tl.sum(tl.where(bins == digit, at_least - counts, 0), 0)
    return left, prefix | (digit.to(tl.uint32) << SHIFT)


@triton.jit
def kth_largest(x, temperature, vocab, k, BLOCK: tl.constexpr):
    """The ``k``-th largest of ``x / temperature``: a radix select of three sweeps, 11, 11 and 10 bits."""
    prefix = tl.full((), 0, tl.uint32)
    left, prefix = radix_level(x, temperature, vocab, k, prefix, 21, 11, True, BLOCK)
    left, prefix = radix_level(x, temperature, vocab, left, prefix, 10, 11, False, BLOCK)
    left, prefix = radix_level(x, temperature, vocab, left, prefix, 0, 10, False, BLOCK)
    signed = (prefix ^ 0x80000000).to(tl.int32, bitcast=True)
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def sweep(x, temperature, vocab, top, floor, candidate, key, BLOCK: tl.constexpr):
    """Mass at or above ``floor``; mass above ``candidate``; and the largest perturbed token above both."""
    lane = tl.arange(0, BLOCK)
    kept = tl.full((), 0.0, tl.float32)
    above = tl.full((), 0.0, tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    best_x = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    for begin in range(0, vocab, BLOCK):
        token = begin + lane
        values = tl.load(x + token, mask=token < vocab, other=float("-inf")) / temperature
        if tl.max(values, 0) >= floor:
            stays = values >= floor
            mass = tl.where(stays, tl.exp(values - top), 0.0)
            higher = stays & (values > candidate)
            kept += tl.sum(mass, 0)
            above += tl.sum(tl.where(higher, mass, 0.0), 0)
            if tl.max(values, 0) > candidate:
                score = tl.where(higher, values + gumbel(key, token), float("-inf"))
                here = tl.max(score, 0)
                here_id = lowest_at(score, here, token)
                here_x = tl.max(tl.where(token == here_id, values, float("-inf")), 0)
                better = here > best
                best_id = tl.where(better, here_id, best_id)
                best_x = tl.where(better, here_x, best_x)
                best = tl.maximum(best, here)
    return kept, above, best_id, best_x


@triton.jit
def choose_kernel(
    logits,
    slice_best,
    slice_top,
    slice_ids,
    invalid_before,
    row_parameters,
    sample_rows,
    sample_tokens,
    positions,
    tokens,  # int32 [rows, history]
    sampled,  # int32 [samples]
    invalid,  # bool [samples]
    vocab,
    history_stride,
    slices,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best token of each row's slices, cut where the row asks for it; goes to the row's history too."""
    sample = tl.program_id(0)
    row = tl.load(sample_rows + sample).to(tl.int64)
    position = tl.load(positions + tl.load(sample_tokens + sample)) + 1
    piece = tl.arange(0, SLICES)
    ok = piece < slices
    at = sample.to(tl.int64) * slices + piece
    tops = tl.load(slice_top + at, mask=ok, other=float("-inf"))
    scores = tl.load(slice_best + at * 2, mask=ok, other=float("-inf"))
    scaled = tl.load(slice_best + at * 2 + 1, mask=ok, other=float("-inf"))
    ids = tl.load(slice_ids + at, mask=ok, other=0)
    top = tl.max(tops, 0)
    bad = tl.load(invalid_before + sample)
    bad = tl.where((top == float("inf")) | (top == float("-inf")), 1, bad)
    # Slices are in order of ids, so the lowest id wins among equals here as it does within one.
    chosen = lowest_at(scores, tl.max(scores, 0), ids)
    temperature = float_parameter(row_parameters, row, _TEMPERATURE)
    if (temperature != 0.0) & (bad == 0):
        x = logits + sample.to(tl.int64) * vocab
        top_k = parameter(row_parameters, row, _TOP_K).to(tl.int32)
        top_p = float_parameter(row_parameters, row, _TOP_P)
        floor = top + float_parameter(row_parameters, row, _LOG_MIN_P)
        candidate = tl.max(tl.where(ids == chosen, scaled, float("-inf")), 0)
        key = row_key(parameter(row_parameters, row, _SEED), position)
        if top_k > 0:
            floor = tl.maximum(floor, kth_largest(x, temperature, vocab, top_k, BLOCK))
        looking = (candidate < floor) | (top_p < 1.0)
        while looking:
            kept, above, next_id, next_x = sweep(x, temperature, vocab, top, floor, candidate, key, BLOCK)
            stays = (candidate >= floor) & ((top_p == 1.0) | (above < top_p * kept))
            chosen = tl.where(stays, chosen, next_id)
            candidate = tl.where(stays, candidate, next_x)
            looking = (stays == 0) & (top_p < 1.0)
    chosen = tl.where(bad != 0, 0, chosen)
    tl.store(sampled + sample, chosen)
    tl.store(invalid + sample, bad != 0)
    tl.store(tokens + row * history_stride + position, chosen)
