"""Flat paged attention: the KV blocks of all sequences of a decode step in one list.

A padded ``[spans, blocks of the longest]`` table makes every sequence pay for the longest.  Here a step
costs the blocks it has, rounded up to one bucket: each listed block is attended by the query of the span it
belongs to, and the blocks' softmaxes are then joined span by span.

The scheme is that of vllm-gaudi (``flat_pa`` and ``pipelined_pa`` in ``extension/ops.py``), written anew.  What
moves data on the device is chosen by what Gaudi's PyTorch bridge lowers to its own kernels:

* queries to blocks, and blocks back to spans, are products with a one-hot matrix (the matrix engine);
* the list is made in the graph from block tables and context lengths, by comparisons and small ``index_select``;
* keys and values are one ``index_select`` of whole blocks each;
* the maximum over a span's blocks cannot be a product.  It is one ``index_reduce`` along dimension 0 with
  ``"amax"`` and ``include_self``, the only form that the bridge runs on the device (``IndexReduceFallbackCheck`` in
  ``hpu_ops/backend/index_reduce_gen.cpp``), and one ``index_select`` back.  torch's own CPU kernel for it
  warns once that it is in beta.

Two things differ from there.  Spans are divided by their sum after the join, so that sums need no way
back to the blocks.  And a product with a one-hot matrix would carry one sequence's NaN to all others (NaN * 0),
so what is not finite is taken out before each product and given back to its own span alone.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from isthmus.contract import AttentionSpec
from isthmus.reference.attention import softcapped

UNSEEN: Final = -1e30
"""The score of a key that is not seen: its weight is exactly 0 beside any real one, and unlike minus infinity it
gives no NaN where a block is all padding."""


class FlatBlocks(NamedTuple):
    """The KV blocks of a step and one window, int32 [blocks] each."""

    block_list: Tensor
    """Blocks of the cache; 0, the spare one, where padded."""
    groups: Tensor
    """The span that a block belongs to; -1 where padded.  Blocks of a span need not be neighbours."""
    first: Tensor
    """The first key of the block that is seen; over 0 only where a sliding window begins inside the block."""
    usage: Tensor
    """The end of the block's keys: those in ``first ... usage - 1`` are seen.  0 where padded."""


def most_blocks(blocks: int, spans: int, block_size: int, window: int) -> int:
    """Blocks that ``spans`` queries can see within ``window`` (0: none) where all they have are ``blocks``."""
    a_span = (window + block_size - 2) // block_size + 1
    return min(blocks, spans * a_span) if window else blocks


def list_blocks(
    block_tables: Tensor,  # int32 [rows, max_blocks]
    rows: Tensor,  # int32 [spans]
    context_lengths: Tensor,  # int32 [spans] keys up to the query, itself included
    count: int,
    block_size: int,
    window: int = 0,
) -> FlatBlocks:
    """The blocks that single queries at their contexts' ends see, span by span, padded to ``count``; traced.

    ``count`` holds them all: see :func:`most_blocks`.  A span of context 0, as padded ones are, has no block.
    """
    spans, where = len(rows), block_tables.device
    begins = (context_lengths - window).clamp(min=0) // block_size if window else context_lengths * 0
    counts = (context_lengths + (block_size - 1)) // block_size - begins
    index = torch.arange(spans, dtype=torch.int32, device=where)
    # Sums over a triangle: spans are few, and a scan is no matter for a device that multiplies matrices.
    ends = torch.where(index[:, None] >= index[None, :], counts[None, :], 0).sum(1, dtype=torch.int32)

    place = torch.arange(count, dtype=torch.int32, device=where)
    groups = (place[:, None] >= ends[None, :]).sum(1, dtype=torch.int32)
    listed = groups < spans
    span = groups.clamp(max=spans - 1)
    in_row = torch.where(listed, place - (ends - counts - begins).index_select(0, span), 0)
    at = rows.index_select(0, span) * block_tables.shape[1] + in_row
    left = context_lengths.index_select(0, span) - in_row * block_size
    return FlatBlocks(
        block_list=torch.where(listed, block_tables.reshape(-1).index_select(0, at), 0),
        groups=torch.where(listed, groups, -1),
        first=torch.where(listed, (left - window).clamp(min=0), 0) if window else place * 0,
        usage=torch.where(listed, left.clamp(max=block_size), 0),
    )


def flat_paged_attention(
    query: Tensor,  # [spans, heads, head_dim]
    keys: Tensor,  # [num_blocks * block_size, kv_heads, head_dim]
    values: Tensor,  # as keys
    blocks: FlatBlocks,
    block_size: int,
    layer: AttentionSpec,
) -> Tensor:
    """Attention of one query a span over the span's blocks: [spans, heads * head_dim] in the query's dtype.

    ``layer.window`` is already in ``blocks``.  Scores, softmax and sums are float32.  A span without
    blocks gives zeros.  A span that meets a NaN in its query or in the keys and values it sees gives NaN, and no
    other does; slots that no span sees may hold anything.  Shapes are static and nothing waits for the host.
    Beside the gathered keys and values it takes 4 bytes for each of their numbers while it runs, the price of
    float32 scores.
    """
    spans, heads, dim = query.shape
    count, kv = blocks.block_list.shape[0], layer.kv_heads
    mapping = blocks.groups[:, None] == torch.arange(spans, dtype=torch.int32, device=query.device)[None, :]

    flawed = ~torch.isfinite(query).flatten(1).all(1)  # [spans]
    clean = query.flatten(1).masked_fill(flawed[:, None], 0.0)
    # One 1 a row, so exact in any dtype: [blocks, kv_heads, queries of a key head, head_dim].
    spread = (mapping.to(query.dtype) @ clean).view(count, kv, heads // kv, dim)

    peaks, parts = _attend_blocks(spread, keys, values, blocks, block_size, layer)

    # A padded block's peak is the lowest there is, so it may stand with span 0's and changes nothing.
    places = blocks.groups.clamp(min=0)
    lowest = torch.full((spans, heads), UNSEEN, dtype=torch.float32, device=query.device)
    span_peaks = lowest.index_reduce(0, places, peaks, "amax", include_self=True)
    parts = parts * torch.exp(peaks - span_peaks.index_select(0, places))[..., None]

    broken = ~torch.isfinite(parts).flatten(1).all(1) | (mapping & flawed[None, :]).any(1)  # [blocks]
    parts = parts.flatten(1).masked_fill(broken[:, None], 0.0)
    sums = (mapping.to(torch.float32).transpose(0, 1) @ parts).view(spans, heads, dim + 1)
    total = sums[..., dim:]
    out = sums[..., :dim] / total.masked_fill(total == 0.0, 1.0)
    broken_spans = (mapping & broken[:, None]).any(0)
    out = out.masked_fill(broken_spans[:, None, None], float("nan"))
    return out.to(query.dtype).flatten(1)


def _attend_blocks(
    query: Tensor,  # [blocks, kv_heads, queries, head_dim]
    keys: Tensor,
    values: Tensor,
    blocks: FlatBlocks,
    block_size: int,
    layer: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """Each block's largest scores [blocks, heads], and relative to them its weighted values and, last, its sum
    of weights [blocks, heads, head_dim + 1], float32."""
    count, kv, queries, dim = query.shape
    key, value = (
        cache.view(-1, block_size, kv, dim).index_select(0, blocks.block_list).transpose(1, 2).float()
        for cache in (keys, values)
    )  # [blocks, kv_heads, block_size, head_dim]
    within = torch.arange(block_size, dtype=torch.int32, device=query.device)[None, :]
    unseen = (within < blocks.first[:, None]) | (within >= blocks.usage[:, None])  # [blocks, block_size]

    scores = softcapped((query.float() * layer.scale) @ key.transpose(2, 3), layer.softcap)
    scores = scores.masked_fill(unseen[:, None, None, :], UNSEEN)
    peaks = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - peaks)
    # A slot that is not seen may hold another sequence's NaN, and NaN times 0 is not 0.
    value = value.masked_fill(unseen[:, None, :, None], 0.0)
    parts = torch.cat((weights @ value, weights.sum(-1, keepdim=True)), -1)
    return peaks.view(count, kv * queries), parts.view(count, kv * queries, dim + 1)
