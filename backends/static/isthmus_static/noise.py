"""The noise of :mod:`isthmus.reference.noise` in few kinds of operations.

Its integers are the reference's; its logarithms are rounded as the device's are.  It does without exclusive or, without
``log1p`` and without ``>>``: compilers do not document the first two, and torch_xla 2.9 divides for the third, which
rounds negative numbers up.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FIRST: Final = 0x85EBCA6B - 2**32
SECOND: Final = 0xC2B2AE35 - 2**32
TOKEN_SALT: Final = 0x7F4A7C15


def gumbel_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """float32 of the broadcast shape, for int32 :func:`isthmus.reference.noise.row_keys` and token ids; traced."""
    bits = _mixed(_xor(keys, _mixed(tokens + TOKEN_SALT)))
    # Both halves are exact in float32, so their sum is rounded once.
    value = _shifted(bits, 16).float() * 2.0**-16 + (bits & 0xFFFF).float() * 2.0**-32 + 2.0**-33
    value = value.clamp(max=1.0 - 2.0**-24)
    return -torch.log(-_log1p_of_negative(value))


def _log1p_of_negative(value: Tensor) -> Tensor:
    """``log(1 - value)`` for ``0 < value < 1``: ``log(u) * -value / (u - 1)`` undoes the rounding of ``u = 1 - value``
    (Kahan; in Higham, Accuracy and Stability of Numerical Algorithms, 1.14.1)."""
    rest = 1.0 - value
    rounded_off = rest == 1.0
    exact = torch.log(rest) * -value / torch.where(rounded_off, 1.0, rest - 1.0)
    return torch.where(rounded_off, -value, exact)


def _mixed(h: Tensor) -> Tensor:
    """``fmix32``, on int32, whose products wrap."""
    h = _xor(h, _shifted(h, 16)) * FIRST
    h = _xor(h, _shifted(h, 13)) * SECOND
    return _xor(h, _shifted(h, 16))


def _xor(left: Tensor, right: Tensor) -> Tensor:
    """The sum and the product wrap."""
    return left + right - 2 * torch.bitwise_and(left, right)


def _shifted(h: Tensor, bits: int) -> Tensor:
    """To the right, bringing in zeros.  The amount is a tensor because torch_xla widens to 64 bits for a number."""
    shifted: Tensor = torch.bitwise_right_shift(h, h.new_full((), bits))
    return shifted & (2 ** (32 - bits) - 1)
