"""Noise for sampling: a counter-based hash of (seed, position, token id), and nothing else.

A device kernel that reproduces it draws the same tokens, up to the rounding of two logarithms.
All integers are 32 bits wide and wrap; ``>>>`` shifts in zeros.  ``fmix32`` is the finaliser of
MurmurHash3 (Austin Appleby, public domain)::

    fmix32(h):  h ^= h >>> 16;  h *= 0x85EBCA6B;  h ^= h >>> 13;  h *= 0xC2B2AE35;  h ^= h >>> 16

    row   = fmix32(fmix32(fmix32(seed_low ^ 0x9E3779B9) ^ seed_high) ^ position)
    h     = fmix32(row ^ fmix32(token + 0x7F4A7C15))
    v     = min(float32(h) * 2**-32 + 2**-33, 1 - 2**-24)      float32(h): unsigned, to nearest even
    noise = -log(-log1p(-v))                                   all in float32

``seed_low`` and ``seed_high`` are the halves of the row's 64-bit seed; ``position`` is where the
sampled token will stand in its sequence, the first prompt token being 0.  ``v`` is uniform; all 32
bits count where it is small, so that large noise, which unlikely tokens need to be drawn at all,
is as frequent as it should be (24 bits would never draw tokens below a probability of about 1e-8).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isthmus.plan import Int32Array

_SEED_SALT: Final = 0x9E3779B9
_TOKEN_SALT: Final = 0x7F4A7C15
_FIRST: Final = 0x85EBCA6B
_SECOND: Final = 0xC2B2AE35


def row_keys(seeds: NDArray[np.int64], positions: Int32Array) -> Int32Array:
    """``row`` of the hash, as the int32 of the same bits, for int64 seeds and int32 positions [rows]."""
    halves = np.ascontiguousarray(seeds, dtype="<i8").view("<u4").reshape(-1, 2)
    low, high = halves[:, 0], halves[:, 1]
    mixed = _fmix32_numpy(low ^ np.uint32(_SEED_SALT))
    mixed = _fmix32_numpy(mixed ^ high)
    return _fmix32_numpy(mixed ^ positions.astype(np.uint32)).view(np.int32)


def token_keys(token_ids: Tensor) -> Tensor:
    """``fmix32(token + 0x7F4A7C15)`` as int32, for int32 ids of any shape."""
    return _fmix32_(token_ids + _TOKEN_SALT)


def gumbel_noise(rows: Tensor, tokens: Tensor) -> Tensor:
    """Noise, float32 of the broadcast shape, from :func:`row_keys` and :func:`token_keys`."""
    bits = _fmix32_(rows ^ tokens)
    # Both halves are exact in float32, so their sum is rounded once: float32(h) of the unsigned h.
    value = ((bits >> 16) & 0xFFFF).float().mul_(2.0**-16)
    value += (bits & 0xFFFF).float().mul_(2.0**-32)
    value.add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)
    return value.neg_().log1p_().neg_().log_().neg_()


def _fmix32_(h: Tensor) -> Tensor:
    """On int32, whose products wrap and whose right shift copies the sign: hence the masks."""
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(_FIRST)
    h ^= (h >> 13) & 0x7FFFF
    h *= _signed(_SECOND)
    h ^= (h >> 16) & 0xFFFF
    return h


def _fmix32_numpy(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(_FIRST)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(_SECOND)
    h = h ^ (h >> np.uint32(16))
    return h


def _signed(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits
