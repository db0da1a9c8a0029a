"""Log-probabilities of chosen tokens, their ranks and the likeliest tokens, in one sweep over the logits and no sort.

Each slice of a row gives its largest logit, its mass, how many of its logits exceed the chosen
token's, and its few likeliest tokens; one program a row merges the slices.  A token's logit and its
number make one integer that orders as both do, so that one reduction finds the next likeliest.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus_triton.ahead import launching
from isthmus_triton.sizes import power_of_two, tiles_of

SLICE: Final = 4096
"""Logits that one program reads."""
MOST_LIKELIEST: Final = 32
"""Tokens that are found so; for more, a sort is not far off."""
_MOST = tl.constexpr(MOST_LIKELIEST)
_LOWEST = tl.constexpr(-(2**63))


@triton.jit
def ordered(logit, token):
    """An integer that is larger for a larger logit and, of equals, for a lower token."""
    bits = logit.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def logit_of(key):
    bits = (key >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def token_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def slice_logprobs_kernel(
    logits,  # float32 [samples, vocab]
    tokens,  # int32 [samples]
    masses,  # float32 [samples, slices, 2]: largest logit, sum of exponentials below it
    above,  # int32 [samples, slices]: logits larger than the token's
    likeliest,  # int64 [samples, slices, MOST], ordered
    row_stride,
    vocab,
    count,
    SLICE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    at = sample * tl.num_programs(1) + piece
    token = piece * SLICE + tl.arange(0, SLICE)
    ok = token < vocab
    row = logits + sample * row_stride
    own = tl.load(row + tl.load(tokens + sample))
    x = tl.load(row + token, mask=ok, other=float("-inf"))
    top = tl.max(x, 0)
    # A slice of nothing but -inf has no mass.
    below = tl.where(top == float("-inf"), 0.0, top)
    tl.store(masses + at * 2, top)
    tl.store(masses + at * 2 + 1, tl.sum(tl.exp(x - below), 0))
    tl.store(above + at, tl.sum((x > own).to(tl.int32), 0))
    keys = tl.where(ok, ordered(x, token), _LOWEST)
    for place in range(count):
        best = tl.max(keys, 0)
        tl.store(likeliest + at * _MOST + place, best)
        keys = tl.where(keys == best, _LOWEST, keys)


@triton.jit(do_not_specialize=["count", "num_slices"])
def merge_logprobs_kernel(
    logits,
    tokens,
    masses,
    above,
    likeliest,
    chosen,  # float32 [samples]
    ranks,  # int32 [samples]
    top_ids,  # int32 [samples, count]
    top_logprobs,  # float32 [samples, count]
    row_stride,
    count,
    num_slices,
    SLICES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, SLICES)
    here = piece < num_slices
    at = sample * num_slices + piece
    tops = tl.load(masses + at * 2, mask=here, other=float("-inf"))
    top = tl.max(tops, 0)
    sums = tl.load(masses + at * 2 + 1, mask=here, other=0.0)
    normaliser = top + tl.log(tl.sum(tl.where(here, sums * tl.exp(tops - top), 0.0), 0))
    own = tl.load(logits + sample * row_stride + tl.load(tokens + sample))
    tl.store(chosen + sample, own - normaliser)
    tl.store(ranks + sample, tl.sum(tl.load(above + at, mask=here, other=0), 0) + 1)
    entry = tl.arange(0, SLICES * _MOST)
    known = (entry // _MOST < num_slices) & (entry % _MOST < count)
    keys = tl.load(likeliest + sample * num_slices * _MOST + entry, mask=known, other=_LOWEST)
    for place in range(count):
        best = tl.max(keys, 0)
        tl.store(top_ids + sample * count + place, token_of(best))
        tl.store(top_logprobs + sample * count + place, logit_of(best) - normaliser)
        keys = tl.where(keys == best, _LOWEST, keys)


def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of ``tokens`` [samples]: log-probability and rank (1 is the likeliest); ids and log-probabilities
    [samples, count] of the likeliest tokens, of equals the lowest first.

    ``logits`` are float32 [samples, vocab], ``count`` at most :data:`MOST_LIKELIEST` and the vocabulary.
    """
    samples, vocab = logits.shape
    assert count <= min(MOST_LIKELIEST, vocab) and logits.stride(1) == 1
    num_slices = tiles_of(vocab, SLICE)
    masses, above = logits.new_empty(samples, num_slices, 2), tokens.new_empty(samples, num_slices)
    likeliest = logits.new_empty(samples, num_slices, MOST_LIKELIEST, dtype=torch.int64)
    chosen, ranks = logits.new_empty(samples), tokens.new_empty(samples)
    top_ids, top_logprobs = tokens.new_empty(samples, count), logits.new_empty(samples, count)
    if samples:
        launching(slice_logprobs_kernel, (samples, num_slices))(
            logits, tokens, masses, above, likeliest, logits.stride(0), vocab, count, SLICE=SLICE, num_warps=4
        )
        launching(merge_logprobs_kernel, (samples,))(
            logits, tokens, masses, above, likeliest, chosen, ranks, top_ids, top_logprobs, logits.stride(0), count,
            num_slices, SLICES=power_of_two(num_slices), num_warps=4,
        )  # fmt: skip
    return chosen, ranks, top_ids, top_logprobs
