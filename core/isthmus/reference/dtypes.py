"""Names of dtypes, as the contract and configs write them, in torch."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from isthmus.errors import Unsupported

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def torch_dtype(name: str) -> torch.dtype:
    """Raises :class:`Unsupported` for a name that is not known here."""
    if name not in _DTYPES:
        raise Unsupported(f"dtype {name!r} is not known; known are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``.  What an 8-bit float cannot hold becomes its largest number, not a NaN; a NaN stays one."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)
