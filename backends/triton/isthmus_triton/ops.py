"""The arithmetic of a layer: the matrix library for products, Triton for what lies between them."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.contract import LinearWeight
from isthmus.reference import DenseLinear, ReferenceOps
from isthmus_triton.kernels.elementwise import gated_activation, gather_rows
from isthmus_triton.kernels.linear import LinearScratch, split_linear, vector_linear
from isthmus_triton.kernels.norm import add_rms_norm, rms_norm
from isthmus_triton.launch import LaunchTable, VectorLinear


class TritonOps(ReferenceOps):
    """:class:`isthmus.contract.Ops`.  Expert mixing is the reference's.

    ``wide_logits`` says that the matrix library multiplies 16-bit matrices into float32.
    """

    def __init__(self, device: torch.device, table: LaunchTable, *, wide_logits: bool = True) -> None:
        super().__init__(device)
        self._table = table
        self._wide_logits = wide_logits
        self._scratch = LinearScratch(device)

    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        return gather_rows(table, token_ids, scale)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        assert isinstance(weight, DenseLinear)
        launch = self._table.linear_for(x.shape[0], weight.out_features, weight.in_features)
        if launch is None or x.dtype == torch.float32:
            return super().linear(x, weight)
        if isinstance(launch, VectorLinear):
            return vector_linear(x, weight.weight, weight.bias, launch)
        return split_linear(x, weight.weight, weight.bias, launch, self._scratch)

    def logits(self, hidden: Tensor, weight: LinearWeight, softcap: float) -> Tensor:
        assert isinstance(weight, DenseLinear)
        rows = hidden.shape[0]
        launch = self._table.linear_for(rows, weight.out_features, weight.in_features)
        if hidden.dtype == torch.float32 or weight.bias is not None or rows == 0:
            return super().logits(hidden, weight, softcap)
        if isinstance(launch, VectorLinear):
            logits = vector_linear(hidden, weight.weight, None, launch, torch.float32)
        elif launch is not None:
            logits = split_linear(hidden, weight.weight, None, launch, self._scratch, torch.float32)
        elif hidden.is_cuda and self._wide_logits:
            # The product's own accumulators, not rounded to the compute dtype on the way.
            logits = torch.mm(hidden, weight.weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden, weight.weight.t()).float()
        return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return rms_norm(x, weight, epsilon)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, epsilon)

    def gated_activation(self, gate_up: Tensor, activation: str) -> Tensor:
        return gated_activation(gate_up, activation)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return gather_rows(x, index)
