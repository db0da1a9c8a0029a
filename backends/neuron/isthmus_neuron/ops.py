"""Arithmetic in operations that AWS's compiler documents; see :mod:`isthmus_neuron.hlo`."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus_static.ops import StaticOps


class DocumentedOps(StaticOps):
    """:class:`StaticOps` for the route over torch_xla, which would emit ``logistic`` for SiLU."""

    def gated_activation(self, gate_up: Tensor, activation: str) -> Tensor:
        if activation != "silu":
            return super().gated_activation(gate_up, activation)
        gate, up = gate_up.chunk(2, dim=-1)
        wide = gate.float()
        return (wide / (1.0 + torch.exp(-wide))).to(gate.dtype) * up
