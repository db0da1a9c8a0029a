"""The arithmetic of a layer in plain torch, on any torch device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contract import LinearWeight


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A weight [out, in] in the checkpoint's own order, and its bias [out]."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    gate_up: Tensor  # [experts, 2 * inner, hidden]
    down: Tensor  # [experts, hidden, inner]


class ReferenceOps:
    """:class:`isthmus.contract.Ops`.  Compute happens in the dtype of the weights given.

    Never overwrites an argument.  :meth:`experts` synchronises once, to learn how many tokens went
    to each expert; nothing else does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        return DenseLinear(
            weight.to(self._device).contiguous(), None if bias is None else bias.to(self._device, weight.dtype)
        )

    def prepare_embedding(self, weight: Tensor) -> tuple[Tensor, LinearWeight]:
        table = self.prepare_table(weight)
        return table, DenseLinear(table)

    def prepare_table(self, weight: Tensor) -> Tensor:
        return weight.to(self._device).contiguous()

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, torch.float32).contiguous()

    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        hidden = F.embedding(token_ids, table)
        # The factor is rounded to the compute dtype first: checkpoints were trained that way.
        return hidden if scale == 1.0 else hidden * torch.tensor(scale, dtype=hidden.dtype, device=hidden.device)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        assert isinstance(weight, DenseLinear)
        return F.linear(x, weight.weight, weight.bias)

    def logits(self, hidden: Tensor, weight: LinearWeight, softcap: float) -> Tensor:
        logits = self.linear(hidden, weight).float()
        return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return rms_norm(x, weight, epsilon)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return rms_norm(total, weight, epsilon), total

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + x

    def gated_activation(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate, activation) * up

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    def prepare_experts(self, gate_up: Tensor, down: Tensor) -> ExpertWeights:
        return ExpertWeights(gate_up.to(self._device).contiguous(), down.to(self._device).contiguous())

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
        probabilities = torch.softmax(router_logits.float(), dim=-1)
        share, chosen = torch.topk(probabilities, top_k, dim=-1)  # [tokens, top_k]
        if renormalize:
            share = share / share.sum(dim=-1, keepdim=True)

        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs by expert
        counts = torch.bincount(chosen.flatten(), minlength=weights.gate_up.shape[0]).tolist()
        mixed = x.new_empty(x.shape[0] * top_k, x.shape[1])
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                pairs = order[begin : begin + count]
                inner = self.gated_activation(F.linear(x[pairs // top_k], weights.gate_up[expert]), activation)
                mixed[pairs] = F.linear(inner, weights.down[expert])
                begin += count
        return (mixed.view(x.shape[0], top_k, x.shape[1]) * share.to(x.dtype).unsqueeze(-1)).sum(dim=1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension in float32, returned in ``x``'s dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon) * weight).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    assert activation == "gelu_tanh", activation
    return F.gelu(x, approximate="tanh")
