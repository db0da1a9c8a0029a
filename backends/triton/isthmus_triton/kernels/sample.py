"""Logits to tokens without a sort and without waiting for the host: see ``isthmus.reference.cut``.

The draw is Gumbel-max over the tokens that the cuts keep, and a cut is a threshold.  So the largest
perturbed token of the whole row is the answer if the cuts keep it; if they do not, they keep no
token of its logit or less either, and the largest perturbed one above it is the next to try.
:mod:`isthmus_triton.kernels.rounds` checks a candidate and finds the next a few times over, for the
rows that need it; what is left then, one program sweeps for each row.  The rows' candidates before
the last are a Poisson number for a row: of mean 0.1 for a ``top_p`` of 0.9, and 0.7 for one of 0.5.

``top_k`` first collects the few tokens that may be among the ``k``: the ``k``-th largest of the
maxima of groups of tokens is a bound from below on the ``k``-th largest token.

Every pass compares logits times the same reciprocal of the row's temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isthmus_triton.kernels.adjust import float_parameter, is_bad, parameter
from isthmus_triton.kernels.noise import fmix32, gumbel, gumbel_of, row_key
from isthmus_triton.kernels.overlap import await_previous, let_next_begin
from isthmus_triton.row_parameters import LOG_MIN_P, SEED, TEMPERATURE, TOP_K, TOP_P

_TEMPERATURE = tl.constexpr(TEMPERATURE)
_TOP_K = tl.constexpr(TOP_K)
_TOP_P = tl.constexpr(TOP_P)
_LOG_MIN_P = tl.constexpr(LOG_MIN_P)
_SEED = tl.constexpr(SEED)

# What a row's STATUS says.
BEST_OF_SLICES = tl.constexpr(0)
"""Its token is the best of its slices."""
FOUND = tl.constexpr(1)
"""Its token is CHOSEN."""
REFUSED = tl.constexpr(2)
"""CHOSEN is the last candidate, and not known to be kept."""
# Places in a row's words.
CHOSEN = tl.constexpr(0)
STATUS = tl.constexpr(1)
ARRIVALS = tl.constexpr(2)
COLLECTED = tl.constexpr(3)
ROW_WORDS = tl.constexpr(4)
# Places in a slice's numbers.
SCORE = tl.constexpr(0)
TOP = tl.constexpr(1)
ABOVE = tl.constexpr(2)
KEPT_OR_SCORE = tl.constexpr(3)
SLICE_NUMBERS = tl.constexpr(4)


@triton.jit
def inverse_temperature(row_parameters, row):
    """Rounded alike in every kernel, since they compare what they get by it.  The row is not greedy."""
    return tl.div_rn(1.0, float_parameter(row_parameters, row, _TEMPERATURE))


@triton.jit
def lowest_at(values, best, tokens):
    """The lowest of ``tokens`` whose value is ``best``."""
    return tl.min(tl.where(values == best, tokens, 0x7FFFFFFF), 0)


@triton.jit
def raise_best(best, best_id, values, key, token_keys, token, ok):
    """The larger of ``best`` and a block's largest perturbed token, and its id; a block where all are -inf has none.

    Noise takes two logarithms, and is at most ``-log(bits * 2**-32)``: most blocks have no token that
    this bound does not rule out already, by one exponential.  It is raised by more than roundings.
    The tokens' half of the hash is read from ``token_keys``, not computed for each row.
    """
    bits = fmix32(key ^ tl.load(token_keys + token, mask=ok, other=0).to(tl.uint32, bitcast=True))
    finite = tl.minimum(tl.maximum(best, -1e38), 1e38)
    bound = tl.exp2(tl.minimum((values - finite) * 1.4426950408889634 + 32.001, 64.0))
    if tl.max((bits.to(tl.float32) <= bound).to(tl.int32), 0) != 0:
        score = values + gumbel_of(bits)
        here = tl.max(score, 0)
        if here > best:
            best = here
            best_id = lowest_at(score, here, token)
    return best, best_id


@triton.jit
def slices_kernel(
    logits,  # float32 [samples, vocab]
    slices,  # float32 [samples, slices, SLICE_NUMBERS]
    slice_ids,  # int32 [samples, slices, 2]: the token of SCORE, the one of a round's
    row_words,  # int32 [samples, ROW_WORDS], void
    queued,  # int32 [QUEUES], zero: how many rows are in each queue
    queue,  # int32 [samples, QUEUES]: rows for the check and the rounds after it
    group_tops,  # float32 [samples, slices * groups]: for top_k, the largest of each GROUP tokens
    row_parameters,
    sample_rows,
    sample_tokens,
    positions,
    token_keys,  # int32 [vocab]
    vocab,
    QUEUES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The best token of each slice of each row: the likeliest, or the largest perturbed one."""
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    sample = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.load(sample_rows + sample).to(tl.int64)
    temperature = float_parameter(row_parameters, row, _TEMPERATURE)
    x = logits + sample.to(tl.int64) * vocab
    first = piece * SLICE
    at = sample.to(tl.int64) * tl.num_programs(1) + piece
    end = tl.minimum(first + SLICE, vocab)
    lane = tl.arange(0, BLOCK)
    # One number each, not one a lane: what registers are saved let more loads be under way.
    top = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32) + first
    bad = tl.full((), 0, tl.int32)
    if piece == 0:
        words = row_words + sample * ROW_WORDS
        tl.store(words + STATUS, BEST_OF_SLICES)
        tl.store(words + ARRIVALS, 0)
        tl.store(words + COLLECTED, 0)
    if temperature == 0.0:
        wide = tl.arange(0, WIDE)
        highest = tl.full((WIDE,), float("-inf"), tl.float32)
        highest_at = tl.zeros((WIDE,), tl.int32) + first
        wrong = tl.zeros((WIDE,), tl.int32)
        for begin in range(first, end, WIDE):
            token = begin + wide
            values = tl.load(x + token, mask=token < end, other=float("-inf"))
            wrong = wrong | (values != values).to(tl.int32)
            highest_at = tl.where(values > highest, token, highest_at)
            highest = tl.where(values > highest, values, highest)
        best = tl.max(highest, 0)
        best_id = lowest_at(highest, best, highest_at)
        bad = tl.max(wrong, 0)
        top = best
    else:
        inverse = inverse_temperature(row_parameters, row)
        position = tl.load(positions + tl.load(sample_tokens + sample)) + 1
        key = row_key(parameter(row_parameters, row, _SEED), position)
        top_k = parameter(row_parameters, row, _TOP_K)
        tops = tl.full((BLOCK,), float("-inf"), tl.float32)
        for begin in range(first, first + SLICE, BLOCK):
            token = begin + lane
            ok = token < end
            values = tl.load(x + token, mask=ok, other=float("-inf")) * inverse
            tops = tl.maximum(tops, values, propagate_nan=tl.PropagateNan.ALL)
            best, best_id = raise_best(best, best_id, values, key, token_keys, token, ok)
            if top_k > 0:
                groups: tl.constexpr = BLOCK // GROUP
                group = at * (SLICE // GROUP) + (begin - first) // GROUP + tl.arange(0, groups)
                tl.store(group_tops + group, tl.max(tl.reshape(values, (groups, GROUP)), 1))
        bad = is_bad(tops)
        top = tl.max(tops, 0)
        if piece == 0:
            cuts = float_parameter(row_parameters, row, _TOP_P) < 1.0
            cuts = cuts | (float_parameter(row_parameters, row, _LOG_MIN_P) > float("-inf"))
            # What top_k leaves, choose_kernel cuts by itself.
            if cuts & (top_k == 0):
                place = tl.atomic_add(queued, 1, sem="relaxed")
                tl.store(queue + place * QUEUES, sample)
    tl.store(slices + at * SLICE_NUMBERS + SCORE, best)
    tl.store(slices + at * SLICE_NUMBERS + TOP, tl.where(bad != 0, float("inf"), top))
    # A slice of nothing but what may not be sampled has no best token.
    tl.store(slice_ids + at * 2, tl.minimum(best_id, vocab - 1))


@triton.jit
def row_best(slices, slice_ids, sample, num_slices, SLICES: tl.constexpr):
    """The best token of a row's slices, and the row's largest logit over temperature."""
    piece = tl.arange(0, SLICES)
    ok = piece < num_slices
    at = sample.to(tl.int64) * num_slices + piece
    scores = tl.load(slices + at * SLICE_NUMBERS + SCORE, mask=ok, other=float("-inf"))
    tops = tl.load(slices + at * SLICE_NUMBERS + TOP, mask=ok, other=float("-inf"))
    ids = tl.load(slice_ids + at * 2, mask=ok, other=0x7FFFFFFF)
    return lowest_at(scores, tl.max(scores, 0), ids), tl.max(tops, 0)


@triton.jit
def ordered(values):
    """uint32 in the order of the floats."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def from_ordered(key):
    signed = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(values, k):
    """The ``k``-th largest of a block, bit by bit."""
    keys = ordered(values)
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = found | bit
        bit = bit >> 1
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, found)
    return from_ordered(found)


@triton.jit
def kth_largest_swept(x, inverse, vocab, k, BLOCK: tl.constexpr):
    """The ``k``-th largest of ``x * inverse``, a sweep a bit: where too many tokens may be among the k."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = found | bit
        bit = bit >> 1
        counts = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, vocab, BLOCK):
            token = begin + lane
            ok = token < vocab
            keys = ordered(tl.load(x + token, mask=ok, other=float("-inf")) * inverse)
            counts += (ok & (keys >= trial)).to(tl.int32)
        found = tl.where(tl.sum(counts, 0) >= k, trial, found)
    return from_ordered(found)


@triton.jit
def collect(x, inverse, vocab, bound, some_x, some_ids, collected, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """Write tokens with ``x * inverse >= bound`` to the scratch, in any order; returns how many there are."""
    lane = tl.arange(0, BLOCK)
    for begin in range(0, vocab, BLOCK):
        token = begin + lane
        ok = token < vocab
        values = tl.load(x + token, mask=ok, other=float("-inf")) * inverse
        keep = ok & (values >= bound)
        place = tl.atomic_add(collected + tl.zeros((BLOCK,), tl.int32), 1, mask=keep, sem="relaxed")
        tl.store(some_x + place, values, mask=keep & (place < MOST))
        tl.store(some_ids + place, token, mask=keep & (place < MOST))
    tl.debug_barrier()
    return tl.load(collected, cache_modifier=".cg")


@triton.jit
def draw_from(values, ids, key, top, floor, top_p):
    """The largest perturbed one of a block's tokens that ``floor`` and ``top_p`` keep."""
    score = tl.where(values >= floor, values + gumbel(key, ids), float("-inf"))
    mass = tl.where(values >= floor, tl.exp(values - top), 0.0)
    most_above = top_p * tl.sum(mass, 0)
    chosen = lowest_at(score, tl.max(score, 0), ids)
    looking = top_p < 1.0
    while looking:
        candidate = tl.max(tl.where(ids == chosen, values, float("-inf")), 0)
        above = tl.sum(tl.where(values > candidate, mass, 0.0), 0)
        looking = above >= most_above
        if looking:
            score = tl.where(values > candidate, score, float("-inf"))
            chosen = lowest_at(score, tl.max(score, 0), ids)
    return chosen


@triton.jit
def sweep(x, inverse, vocab, top, floor, candidate, key, token_keys, BLOCK: tl.constexpr):
    """Mass at or above ``floor``; mass above ``candidate``; and the largest perturbed token above both, or 0."""
    lane = tl.arange(0, BLOCK)
    kept = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    for begin in range(0, vocab, BLOCK):
        token = begin + lane
        ok = token < vocab
        values = tl.load(x + token, mask=ok, other=float("-inf")) * inverse
        mass = tl.where(values >= floor, tl.exp(values - top), 0.0)
        higher = (values >= floor) & (values > candidate)
        kept += mass
        above += tl.where(higher, mass, 0.0)
        values = tl.where(higher, values, float("-inf"))
        best, best_id = raise_best(best, best_id, values, key, token_keys, token, ok)
    return tl.sum(kept, 0), tl.sum(above, 0), best_id


@triton.jit
def choose_kernel(
    logits,
    slices,
    slice_ids,
    row_words,
    group_tops,
    some_x,  # float32 [samples, MOST]
    some_ids,  # int32 [samples, MOST]
    invalid_before,
    row_parameters,
    sample_rows,
    sample_tokens,
    positions,
    token_keys,  # int32 [vocab]
    tokens,  # int32 [rows, history]
    sampled,  # int32 [samples]
    invalid,  # bool [samples]
    vocab,
    history_stride,
    num_slices,
    num_groups,
    SLICES: tl.constexpr,
    GROUPS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The token of each row, cut by ``top_k`` where the row asks for it; goes to the row's history too."""
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    sample = tl.program_id(0)
    row = tl.load(sample_rows + sample).to(tl.int64)
    position = tl.load(positions + tl.load(sample_tokens + sample)) + 1
    chosen, top = row_best(slices, slice_ids, sample, num_slices, SLICES)
    words = row_words + sample * ROW_WORDS
    status = tl.load(words + STATUS)
    chosen = tl.where(status == BEST_OF_SLICES, chosen, tl.load(words + CHOSEN))
    bad = tl.load(invalid_before + sample)
    bad = tl.where((top == float("inf")) | (top == float("-inf")), 1, bad)
    temperature = float_parameter(row_parameters, row, _TEMPERATURE)
    if (temperature != 0.0) & (bad == 0):
        x = logits + sample.to(tl.int64) * vocab
        inverse = inverse_temperature(row_parameters, row)
        top_k = parameter(row_parameters, row, _TOP_K).to(tl.int32)
        top_p = float_parameter(row_parameters, row, _TOP_P)
        floor = top + float_parameter(row_parameters, row, _LOG_MIN_P)
        key = row_key(parameter(row_parameters, row, _SEED), position)
        looking = status == REFUSED
        if top_k > 0:
            count = MOST + 1
            at = sample.to(tl.int64) * MOST
            if top_k <= tl.minimum(num_groups, MOST):
                group = tl.arange(0, GROUPS)
                tops = tl.load(
                    group_tops + sample.to(tl.int64) * num_groups + group, mask=group < num_groups, other=float("-inf")
                )
                bound = kth_largest(tops, top_k)
                count = collect(x, inverse, vocab, bound, some_x + at, some_ids + at, words + COLLECTED, BLOCK, MOST)
            if count <= MOST:
                place = tl.arange(0, MOST)
                values = tl.load(some_x + at + place, mask=place < count, other=float("-inf"), cache_modifier=".cg")
                ids = tl.load(some_ids + at + place, mask=place < count, other=0x7FFFFFFF, cache_modifier=".cg")
                floor = tl.maximum(floor, kth_largest(values, top_k))
                chosen = draw_from(values, ids, key, top, floor, top_p)
            else:
                floor = tl.maximum(floor, kth_largest_swept(x, inverse, vocab, top_k, BLOCK))
                looking = True
        candidate = tl.load(x + chosen) * inverse
        while looking:
            kept, above, next_id = sweep(x, inverse, vocab, top, floor, candidate, key, token_keys, BLOCK)
            stays = (candidate >= floor) & ((top_p == 1.0) | (above < top_p * kept))
            chosen = tl.where(stays, chosen, next_id)
            candidate = tl.load(x + chosen) * inverse
            looking = (stays == 0) & (top_p < 1.0)
    chosen = tl.where(bad != 0, 0, chosen)
    tl.store(sampled + sample, chosen)
    tl.store(invalid + sample, bad != 0)
    tl.store(tokens + row * history_stride + position, chosen)
