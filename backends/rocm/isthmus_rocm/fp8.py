"""Which 8-bit floating-point form an architecture multiplies, and checkpoints in the other one.

Checkpoints hold e4m3 in the OCP form (torch's ``float8_e4m3fn``: exponent bias 7, largest 448, NaN where
all other bits are set, two zeros).  MI300 multiplies the fnuz form (``float8_e4m3fnuz``: bias 8, largest
240, one zero, and NaN is what would be the negative one).  So the same bits mean half as much there, but
for three of the 256.  Source: AMD's instruction set documents, and "FP8 Formats for Deep Learning"
(Micikevicius et al., 2022).

A cache of 8 bits is ``float8_e4m3fn`` and so for the architectures of the OCP form.  Nothing in the engine
takes fp8 weights yet; :func:`to_fnuz` is what a part that does will need.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

OCP: Final = torch.float8_e4m3fn
FNUZ: Final = torch.float8_e4m3fnuz

FORMS: Final[dict[str, torch.dtype | None]] = {
    "gfx90a": None,
    "gfx942": FNUZ,
    "gfx950": OCP,
    "gfx1100": None,
    "gfx1201": OCP,
}
"""The e4m3 that an architecture's matrix instructions take; ``None`` where they take none, and Triton
compiles products of 8-bit numbers into 16-bit ones."""

NEGATIVE_ZERO: Final = 0x80
"""Of the OCP form; in the fnuz form these bits are the NaN."""
NAN_MAGNITUDE: Final = 0x7F
"""Of the OCP form, without its sign; in the fnuz form these bits are 240."""


def to_fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weight ``weight * scale`` with ``weight`` in the fnuz form: the same numbers exactly, NaN included.

    ``weight`` is ``float8_e4m3fn`` of any shape, ``scale`` float32 of any shape (a tensor's, a row's, a
    block's).  Neither is changed; the result's scale is twice as large.
    """
    assert weight.dtype == OCP, f"the weight is {weight.dtype}, not {OCP}"
    bits = weight.view(torch.uint8)
    nan = (bits & 0x7F) == NAN_MAGNITUDE
    bits = torch.where(bits == NEGATIVE_ZERO, 0, bits)
    bits = torch.where(nan, NEGATIVE_ZERO, bits)
    return bits.view(FNUZ), scale * 2.0
