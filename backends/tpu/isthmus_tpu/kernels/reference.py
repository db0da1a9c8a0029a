"""What the kernels of this folder compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    num_spans: Tensor,
    *,
    kv_heads: int,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Span by span, in float32; arguments and result as in :func:`.ragged_paged_attention.ragged_paged_attention`."""
    out = torch.zeros_like(query)
    head_dim = query.shape[2]
    for span in range(int(num_spans[0])):
        begin, end = int(query_starts[span]), int(query_starts[span + 1])
        context = int(context_lengths[span])
        blocks = block_tables[span, : -(-context // block_size)].long()
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:context]
        key, value = (
            cache[slots, : kv_heads * head_dim].view(context, kv_heads, head_dim).float() for cache in (keys, values)
        )

        at = torch.arange(context - (end - begin), context)[:, None]
        position = torch.arange(context)
        seen = position <= at
        if window:
            seen &= position > at - window
        grouped = query[begin:end].view(end - begin, kv_heads, -1, head_dim).float()
        scores = torch.einsum("qhgd,khd->hgqk", grouped, key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        attended = torch.einsum("hgqk,khd->qhgd", weights, value)
        out[begin:end] = attended.reshape(end - begin, -1, head_dim).to(query.dtype)
    return out
