"""The noise of ``isthmus.reference.noise`` in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fmix32(h):
    """The finaliser of MurmurHash3 (Austin Appleby, public domain), on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_key(seed, position):
    """uint32 from a row's int64 seed and the position of the token to sample."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    mixed = fmix32(fmix32(low ^ 0x9E3779B9) ^ high)
    return fmix32(mixed ^ position.to(tl.uint32))


@triton.jit
def token_key(tokens):
    """uint32 of int32 token ids, the same for every row."""
    return fmix32(tokens.to(tl.uint32) + 0x7F4A7C15)


@triton.jit
def gumbel_of(bits):
    """Gumbel noise, float32, of uint32 hashes: not more than ``-log(bits * 2**-32)``."""
    v = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.9999999403953552)
    # -log1p(-v): the logarithm of the hardware is not exact near 1, a short series is.
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * (0.25 + v * 0.2))))
    exponential = tl.where(v < 0.03125, series, -tl.log(1.0 - v))
    return -tl.log(exponential)


@triton.jit
def gumbel(key, tokens):
    """Gumbel noise, float32, of a :func:`row_key` and int32 token ids."""
    return gumbel_of(fmix32(key ^ token_key(tokens)))
