"""Attention by rows: tiles of queries, each over the blocks of its own row, padded to one number of blocks.

A span of one token is a tile of one query.  Longer spans are cut into tiles of ``TILE`` queries; a
token finds its tile's result by index, so nothing is scattered.  Keys come by one gather of whole
blocks, and their softmax is computed over pieces of ``KEYS_AT_ONCE`` keys with a running maximum
(Milakov and Gimelshein 2018, as in FlashAttention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits
from isthmus.reference.attention import softcapped
from isthmus_static.layout import HostStep, PagedCache, StaticStepInputs
from isthmus_static.step_buffer import StepBuffer

TILE: Final = 32
"""Queries of a tile of a longer span."""
KEYS_AT_ONCE: Final = 1024
"""Bounds the scores that are alive together."""
UNSEEN: Final = -1e30
"""Finite, so that a tile's padding has no NaN."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    tables: Tensor  # int64 [tiles, blocks]
    starts: Tensor  # int32 [tiles] position of the first query
    ends: Tensor  # int32 [tiles] position after the last one
    queries: Tensor | None  # int64 [tiles * TILE] each tile's tokens; None: token i is tile i
    places: Tensor | None  # int64 [tokens] where in the tiles a token is
    block_size: int


class RowLayout:
    """:class:`isthmus_static.layout.AttentionLayout`."""

    def sizes(self, limits: Limits) -> dict[str, int]:
        tiles = self._tiles(limits.max_tokens, limits.max_rows)
        return {"tile_rows": tiles, "tile_begins": tiles, "tile_starts": tiles, "tile_ends": tiles,
                "places": max(limits.max_tokens, limits.max_rows)}  # fmt: skip

    def fill(self, buffer: StepBuffer, step: HostStep, limits: Limits) -> None:
        lengths = np.diff(step.offsets)
        counts = -(-lengths // TILE)
        span = np.repeat(np.arange(len(lengths)), counts)
        first = np.cumsum(counts) - counts  # each span's first tile
        begin = (np.arange(len(span)) - first[span]) * TILE  # of the tile within its span
        starts = step.starts[span] + begin
        buffer.write("tile_rows", step.rows[span], limits.max_rows)
        buffer.write("tile_begins", step.offsets[:-1][span] + begin)
        buffer.write("tile_starts", starts)
        buffer.write("tile_ends", np.minimum(starts + TILE, step.contexts[span]), 1)
        token_span = np.repeat(np.arange(len(lengths)), lengths)
        within = np.arange(step.offsets[-1]) - step.offsets[:-1][token_span]
        buffer.write("places", first[token_span] * TILE + within)

    def plan(self, inputs: StaticStepInputs, buffer: StepBuffer, limits: Limits) -> RowPlan:
        shape, ints = inputs.shape, inputs.ints
        blocks = shape.blocks or limits.max_blocks_per_row
        if shape.single:
            rows, starts, ends = inputs.span_rows, inputs.positions, inputs.context_lengths
            queries = places = None
        else:
            tiles = self._tiles(shape.tokens, shape.spans)
            rows, begins, starts, ends = (
                buffer.take(ints, name, tiles) for name in ("tile_rows", "tile_begins", "tile_starts", "tile_ends")
            )
            offsets = torch.arange(TILE, device=ints.device, dtype=torch.int32)
            # A tile's unused queries stand for some other token, and nothing reads what they attend to.
            queries = (begins[:, None] + offsets).clamp(max=shape.tokens - 1).flatten().long()
            places = buffer.take(ints, "places", shape.tokens).long()
        tables = inputs.block_tables.index_select(0, rows.long())[:, :blocks].long()
        return RowPlan(tables, starts, ends, queries, places, limits.block_size)

    def attend(self, query: Tensor, cache: PagedCache, layer: AttentionSpec, plan: RowPlan) -> Tensor:
        tiles = plan.tables.shape[0]
        if plan.queries is None or plan.places is None:
            return attend_tiles(query.reshape(tiles, 1, layer.heads, layer.head_dim), cache, layer, plan).flatten(1)
        tiled = query.index_select(0, plan.queries).view(tiles, TILE, layer.heads, layer.head_dim)
        attended = attend_tiles(tiled, cache, layer, plan)
        return attended.reshape(tiles * TILE, -1).index_select(0, plan.places)

    def _tiles(self, tokens: int, spans: int) -> int:
        """Each span wastes less than one tile."""
        return tokens // TILE + spans


def attend_tiles(query: Tensor, cache: PagedCache, layer: AttentionSpec, plan: RowPlan) -> Tensor:
    """Of query [tiles, queries, heads, head_dim]; the same shape, in its dtype."""
    tiles, queries, heads, dim = query.shape
    kv, group, size = layer.kv_heads, heads // layer.kv_heads, plan.block_size
    grouped = query.float().mul(layer.scale).view(tiles, queries, kv, group, dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(tiles, kv, group * queries, dim)
    where = query.device
    positions = plan.starts[:, None] + torch.arange(queries, device=where, dtype=torch.int32)  # [tiles, queries]

    highest = torch.full((tiles, kv, group * queries, 1), UNSEEN, device=where)
    total = torch.zeros((tiles, kv, group * queries, 1), device=where)
    mixed = torch.zeros((tiles, kv, group * queries, dim), device=where)
    at_once = max(KEYS_AT_ONCE // size, 1)
    for begin in range(0, plan.tables.shape[1], at_once):
        tables = plan.tables[:, begin : begin + at_once]
        keys, values = (_gathered(store, tables, size, kv, dim) for store in (cache.keys, cache.values))
        places = begin * size + torch.arange(keys.shape[2], device=where, dtype=torch.int32)
        seen = places <= positions[:, :, None]  # [tiles, queries, keys]
        if layer.window:
            seen = seen & (places > positions[:, :, None] - layer.window)
        seen = seen.repeat(1, group, 1)[:, None]  # [tiles, 1, group * queries, keys]
        scores = softcapped(grouped @ keys.transpose(2, 3), layer.softcap)
        scores = torch.where(seen, scores, UNSEEN)
        # A place after the tile may hold another sequence's NaN, and NaN times 0 is not 0.
        values = torch.where((places < plan.ends[:, None])[:, None, :, None], values, 0.0)
        higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        weights = torch.where(seen, torch.exp(scores - higher), 0.0)
        kept = torch.exp(highest - higher)
        total = total * kept + weights.sum(dim=-1, keepdim=True)
        mixed = mixed * kept + weights @ values
        highest = higher
    mixed = mixed / total.clamp(min=1e-30)
    back = mixed.view(tiles, kv, group, queries, dim).permute(0, 3, 1, 2, 4)
    return back.reshape(tiles, queries, heads, dim).to(query.dtype)


def _gathered(store: Tensor, tables: Tensor, block_size: int, kv_heads: int, head_dim: int) -> Tensor:
    """float32 [tiles, kv_heads, blocks * block_size, head_dim]."""
    tiles, blocks = tables.shape
    # Whole blocks, with a slot's own axes as they are: a view that folds them has another layout in memory than the
    # cache where a compiler tiles arrays by their last two axes, and would copy the cache for it.
    by_block = store.view(-1, block_size, *store.shape[1:])
    found = by_block.index_select(0, tables.flatten())
    if found.dim() == 3:  # heads side by side
        found = found[:, :, : kv_heads * head_dim]
    return found.reshape(tiles, blocks * block_size, kv_heads, head_dim).transpose(1, 2).float()
