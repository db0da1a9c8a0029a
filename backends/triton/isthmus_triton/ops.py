"""The arithmetic of a layer: the matrix library for products, Triton for what lies between them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from isthmus.contract import LinearWeight
from isthmus.reference import DenseLinear, ReferenceOps
from isthmus.reference.ops import ExpertWeights
from isthmus_triton.ahead import CompileAhead, listing
from isthmus_triton.kernels.elementwise import gated_activation, gather_rows
from isthmus_triton.kernels.experts import Routing, expert_linear_launch, mix_experts
from isthmus_triton.kernels.linear import (
    LinearScratch,
    padded_rows,
    split_launch,
    split_linear,
    vector_launch,
    vector_linear,
)
from isthmus_triton.kernels.norm import add_rms_norm, rms_norm
from isthmus_triton.launch import LaunchTable, VectorLinear

LIKELY_HEAD: Final = 8
"""Rows of a weight for each column, above which it is taken for one that may give logits."""


class TritonOps(ReferenceOps):
    """:class:`isthmus.contract.Ops`.  Nothing here synchronises.

    ``wide_logits`` says that the matrix library multiplies 16-bit matrices into float32.
    """

    def __init__(
        self, device: torch.device, table: LaunchTable, *, wide_logits: bool = True, ahead: CompileAhead | None = None
    ) -> None:
        super().__init__(device)
        self._table = table
        self._wide_logits = wide_logits
        self._scratch = LinearScratch(device)
        self._ahead = ahead or CompileAhead(device)

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        self._compile_few_rows(*weight.shape, weight.dtype, biased=bias is not None)
        return super().prepare_linear(weight, bias)

    def prepare_embedding(self, weight: Tensor) -> tuple[Tensor, LinearWeight]:
        self._compile_few_rows(*weight.shape, weight.dtype, biased=False)
        return super().prepare_embedding(weight)

    def _compile_few_rows(self, out_features: int, in_features: int, dtype: torch.dtype, *, biased: bool) -> None:
        """Begin to compile every product of a weight that the table does not leave to the matrix library."""
        if not self._ahead.active or dtype == torch.float32:
            return
        variants = {
            (launch, padded_rows(rows))
            for rows in range(1, max((rule.most_rows for rule in self._table.linear), default=0) + 1)
            if (launch := self._table.linear_for(rows, out_features, in_features)) is not None
        }
        x = torch.zeros(16, dtype=dtype, device=self._device)
        counts = torch.zeros(16, dtype=torch.int32, device=self._device)
        wide = torch.zeros(16, device=self._device)
        bias, sizes, overlap = x if biased else None, (out_features, in_features), self._table.overlap
        # A weight this tall may well give the logits.
        for out in (x, wide) if out_features > LIKELY_HEAD * in_features and not biased else (x,):
            for launch, rows in variants:
                if isinstance(launch, VectorLinear):
                    made = vector_launch(x, x, bias, out, sizes, launch, overlap)
                else:
                    made = split_launch(x, x, bias, out, (wide, counts), (rows, *sizes), launch, overlap)
                self._ahead.begin([made])

    def prepare_table(self, weight: Tensor) -> Tensor:
        self._compile(weight.shape[1], weight.dtype)
        return super().prepare_table(weight)

    def prepare_experts(self, gate_up: Tensor, down: Tensor) -> ExpertWeights:
        weights = super().prepare_experts(gate_up, down)
        if self._ahead.active:
            x = torch.zeros(16, dtype=gate_up.dtype, device=self._device)
            routing = Routing(torch.zeros(2, 2, device=self._device), x.int(), x.int())
            self._ahead.begin([
                expert_linear_launch(x, weight, x, routing, launch, activation, self._table.overlap)
                for launch in self._table.experts_in(x.itemsize)
                for weight, activation in ((weights.gate_up, "silu"), (weights.down, ""))
            ])  # fmt: skip
        return weights

    def _compile(self, hidden: int, dtype: torch.dtype) -> None:
        """Begin to compile what lies between the products of a layer, of the usual kind."""
        if not self._ahead.active:
            return
        index = torch.zeros(2, dtype=torch.int32, device=self._device)
        x, residual, gate_up = (
            torch.zeros(2, columns, dtype=dtype, device=self._device) for columns in (hidden, hidden, 8 * hidden)
        )
        norm = torch.zeros(hidden, device=self._device)
        with listing() as launches:
            self.embed(index, x, 1.0)
            self.take_rows(x, index)
            self.rms_norm(x, norm, 1e-5)
            self.add_rms_norm(x, residual, norm, 1e-5)
            self.gated_activation(gate_up, "silu")
        self._ahead.begin(launches)

    def _wait(self) -> None:
        self._ahead.wait()

    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        return gather_rows(table, token_ids, scale)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        assert isinstance(weight, DenseLinear)
        launch = self._table.linear_for(x.shape[0], weight.out_features, weight.in_features)
        if launch is None or x.dtype == torch.float32:
            return super().linear(x, weight)
        overlap = self._table.overlap
        self._wait()
        if isinstance(launch, VectorLinear):
            return vector_linear(x, weight.weight, weight.bias, launch, overlap=overlap)
        return split_linear(x, weight.weight, weight.bias, launch, self._scratch, overlap=overlap)

    def logits(self, hidden: Tensor, weight: LinearWeight, softcap: float) -> Tensor:
        assert isinstance(weight, DenseLinear)
        rows = hidden.shape[0]
        launch = self._table.linear_for(rows, weight.out_features, weight.in_features)
        if hidden.dtype == torch.float32 or weight.bias is not None or rows == 0:
            return super().logits(hidden, weight, softcap)
        if launch is not None:
            self._wait()
        if isinstance(launch, VectorLinear):
            logits = vector_linear(hidden, weight.weight, None, launch, torch.float32, overlap=self._table.overlap)
        elif launch is not None:
            logits = split_linear(
                hidden, weight.weight, None, launch, self._scratch, torch.float32, overlap=self._table.overlap
            )
        elif hidden.is_cuda and self._wide_logits:
            # The product's own accumulators, not rounded to the compute dtype on the way.
            logits = torch.mm(hidden, weight.weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden, weight.weight.t()).float()
        return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return rms_norm(x, weight, epsilon, overlap=self._table.overlap)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, epsilon, overlap=self._table.overlap)

    def gated_activation(self, gate_up: Tensor, activation: str) -> Tensor:
        return gated_activation(gate_up, activation, overlap=self._table.overlap)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return gather_rows(x, index)

    def experts(
        self,
        x: Tensor,
        router_logits: Tensor,
        weights: ExpertWeights,
        *,
        top_k: int,
        renormalize: bool,
        activation: str,
    ) -> Tensor:
        self._wait()
        return mix_experts(
            x,
            router_logits,
            weights.gate_up,
            weights.down,
            top_k=top_k,
            renormalize=renormalize,
            activation=activation,
            launches=self._table.experts_in(x.itemsize),
            overlap=self._table.overlap,
        )
