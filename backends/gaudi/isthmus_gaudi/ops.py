"""Linear layers with 8-bit weights, quantised as they are loaded."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from isthmus.contract import LinearWeight
from isthmus_gaudi.fp8 import Fp8Weight, linear_fp8, quantize
from isthmus_static.ops import StaticOps

FEWEST_CHANNELS: Final = 512
"""Narrower weights stay as they are: there is little to gain, and a router of experts is among them."""


class Fp8Ops(StaticOps):
    """:class:`isthmus.contract.Ops` with one scale an output channel, and experts and embeddings left as they are.

    An output projection that is tied to the embedding stays as well; one of its own is quantised.
    """

    def __init__(self, device: torch.device, limit: float, *, native: bool) -> None:
        """``limit`` is the device's largest number in 8 bits; ``native`` multiplies by the vendor's operators."""
        super().__init__(device)
        self._limit = limit
        self._native = native

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        if len(weight) < FEWEST_CHANNELS:
            return super().prepare_linear(weight, bias)
        # Where the weight is, which for a checkpoint's is the host: its rounding is torch's own.
        small = quantize(weight, self._limit)
        return Fp8Weight(
            weight=small.weight.to(self._device),
            scale=small.scale.to(self._device),
            limit=self._limit,
            bias=None if bias is None else bias.to(self._device, weight.dtype),
        )

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        if isinstance(weight, Fp8Weight):
            return linear_fp8(x, weight, native=self._native)
        return super().linear(x, weight)
