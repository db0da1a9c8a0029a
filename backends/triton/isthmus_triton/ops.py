"""The arithmetic of a layer: the matrix library for products, Triton for what lies between them."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.contract import LinearWeight
from isthmus.reference import DenseLinear, ReferenceOps
from isthmus_triton.ahead import CompileAhead, Launch
from isthmus_triton.kernels.elementwise import gated_activation, gather_rows
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


class TritonOps(ReferenceOps):
    """:class:`isthmus.contract.Ops`.  Expert mixing is the reference's.

    ``wide_logits`` says that the matrix library multiplies 16-bit matrices into float32.
    """

    def __init__(self, device: torch.device, table: LaunchTable, *, wide_logits: bool = True) -> None:
        super().__init__(device)
        self._table = table
        self._wide_logits = wide_logits
        self._scratch = LinearScratch(device)
        self._ahead: CompileAhead | None = None

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        if self._ahead is None and weight.dtype != torch.float32:
            self._ahead = CompileAhead(self._device)
            self._ahead.begin(self._few_row_launches(weight.dtype))
        return super().prepare_linear(weight, bias)

    def _few_row_launches(self, dtype: torch.dtype) -> list[Launch]:
        """Every product of the table, into the compute dtype and as logits; sizes stand for any like them."""
        launches = []
        x = torch.zeros(16, dtype=dtype, device=self._device)
        counts = torch.zeros(16, dtype=torch.int32, device=self._device)
        logits = torch.zeros(16, device=self._device)
        variants = set()
        for rule in self._table.linear:
            for rows in {padded_rows(count) for count in range(rule.least_rows, rule.most_rows + 1)}:
                variants |= {(rule.launch, rows, out) for out in ("x", "logits") if out == "x" or rule.least_out}
                if isinstance(rule.launch, VectorLinear):
                    variants.add((rule.launch, rows, "logits"))
        for launch, rows, name in variants:
            out = x if name == "x" else logits
            if isinstance(launch, VectorLinear):
                launches.append(vector_launch(x, x, None, out, (65536, 65536), launch, self._table.overlap))
            else:
                sizes = (rows, 65536, 65536)
                launches.append(split_launch(x, x, None, out, (logits, counts), sizes, launch, self._table.overlap))
        return launches

    def _wait(self) -> None:
        if self._ahead is not None:
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
