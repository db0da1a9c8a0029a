"""The arithmetic of a layer, so that a compiler can trace it: no value is looked at, no shape depends on one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.reference.ops import ExpertWeights, ReferenceOps


class StaticOps(ReferenceOps):
    """:class:`isthmus.contract.Ops`: the reference's where that traces.

    Experts are computed by all tokens and weighted by the router, those not chosen by 0: as many
    times the work as there are experts for each chosen one, in return for one shape.
    """

    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
        hidden = F.embedding(token_ids, table)
        return hidden if scale == 1.0 else hidden * _rounded(scale, hidden.dtype)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index.long())

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
        share = _shares(torch.softmax(router_logits.float(), dim=-1), top_k)  # [tokens, experts]
        if renormalize:
            share = share / share.sum(dim=-1, keepdim=True)
        inner = self.gated_activation(torch.einsum("th,eoh->eto", x, weights.gate_up), activation)
        each = torch.einsum("eti,ehi->eth", inner, weights.down)
        return (each * share.to(x.dtype).t().unsqueeze(-1)).sum(dim=0)


def _shares(probabilities: Tensor, top_k: int) -> Tensor:
    """``probabilities`` of the ``top_k`` likeliest of each row and 0 elsewhere; without a sort."""
    left, chosen = probabilities, torch.zeros_like(probabilities)
    ids = torch.arange(probabilities.shape[1], device=probabilities.device)
    for _ in range(top_k):
        is_best = left == left.amax(dim=-1, keepdim=True)
        lowest = torch.where(is_best, ids, probabilities.shape[1]).amin(dim=-1, keepdim=True)
        chosen = torch.where(ids == lowest, probabilities, chosen)
        left = torch.where(ids == lowest, -1.0, left)
    return chosen


@torch._dynamo.assume_constant_result
def _rounded(scale: float, dtype: torch.dtype) -> float:
    """Checkpoints were trained with the factor in the compute dtype."""
    return float(torch.tensor(scale, dtype=dtype))
