"""Paged attention in plain torch, on any torch device.

Queries of one token are batched (one gather of keys, one grouped matmul); longer spans run one by
one through torch's fused attention in pieces of queries, each over just the keys it can see.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepInputs
from isthmus.errors import OutOfMemory
from isthmus.reference.dtypes import saturated, torch_dtype
from isthmus.reference.ops import rms_norm

QUERY_PIECE: Final = 256
"""Queries attended at once within a span: bounds the mask, and skips keys after the piece."""
GATHER_TOKENS: Final = 65536
"""Keys gathered at once for single-token spans."""


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer's keys and values."""

    keys: Tensor  # [num_blocks, block_size, kv_heads, head_dim]
    values: Tensor  # [num_blocks, block_size, kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class _Single:
    """Spans of one token that are attended together over ``width`` keys each."""

    tokens: Tensor  # int64 [group] index into the step's tokens
    slots: Tensor  # int64 [group, width] where the keys are
    unseen: Tensor  # bool [group, width] keys before the window, or after the query


@dataclass(frozen=True, slots=True)
class _Span:
    """A span of several tokens."""

    begin: int  # its first token in the step
    length: int
    start: int  # the position of that token
    slots: Tensor  # int64 [start + length] of positions 0, 1, ...


@dataclass(slots=True)
class ReferencePlan:
    """A step's spans on the host.  Making it waits for the device where that is apart."""

    block_size: int
    span_rows: Tensor
    block_tables: Tensor
    starts: list[int]  # per span, the first token's index
    lengths: list[int]
    contexts: list[int]
    longs: list[_Span] = field(default_factory=list)
    singles: dict[int, list[_Single]] = field(default_factory=dict)  # by window

    def singles_for(self, window: int) -> list[_Single]:
        if window not in self.singles:
            spans = [index for index, length in enumerate(self.lengths) if length == 1]
            self.singles[window] = [self._single(group, window) for group in self._groups(spans, window)]
        return self.singles[window]

    def _keys_seen(self, span: int, window: int) -> int:
        context = self.contexts[span]
        return min(context, window) if window else context

    def _groups(self, spans: list[int], window: int) -> list[list[int]]:
        """Split so that no span is padded to much more than its own keys."""
        groups: list[list[int]] = []
        shortest = 0
        for span in sorted(spans, key=lambda s: self._keys_seen(s, window)):
            seen = self._keys_seen(span, window)
            if groups and seen <= 2 * shortest + 64 and (len(groups[-1]) + 1) * seen <= GATHER_TOKENS:
                groups[-1].append(span)
            else:
                groups.append([span])
                shortest = seen
        return groups

    def _single(self, group: list[int], window: int) -> _Single:
        device = self.span_rows.device
        size = self.block_size
        first_blocks = [(self.contexts[span] - self._keys_seen(span, window)) // size for span in group]
        num_blocks = max(-(-self.contexts[s] // size) - first for s, first in zip(group, first_blocks, strict=True))
        first = torch.tensor(first_blocks, device=device)[:, None]
        context = torch.tensor([self.contexts[span] for span in group], device=device)[:, None]
        rows = self.span_rows[torch.tensor(group, device=device)].long()

        offsets = torch.arange(num_blocks, device=device)
        # A shorter span's trailing places would run past its table; they are masked below.
        places = (first + offsets).clamp_(max=self.block_tables.shape[1] - 1)
        blocks = self.block_tables[rows[:, None], places].long()
        within = torch.arange(size, device=device)
        slots = (blocks[:, :, None] * size + within).flatten(1)
        positions = first * size + torch.arange(num_blocks * size, device=device)
        unseen = positions >= context
        if window:
            unseen |= positions < context - window
        tokens = torch.tensor([self.starts[span] for span in group], device=device)
        return _Single(tokens, slots, unseen)


class ReferenceAttention:
    """:class:`isthmus.contract.Attention` over :class:`PagedCache`.

    Scores and their softmax are float32 whatever the compute dtype.  An 8-bit cache has no scales.
    :meth:`plan` reads the step's span lengths on the host, and so waits for the device where that is apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block_size = 0

    def block_bytes(self, layer: AttentionSpec, block_size: int, kv_dtype: str) -> int:
        return 2 * block_size * layer.kv_heads * layer.head_dim * torch_dtype(kv_dtype).itemsize

    def allocate(self, layers: Sequence[AttentionSpec], limits: Limits, kv_dtype: str) -> Sequence[PagedCache]:
        self._block_size = limits.block_size
        dtype = torch_dtype(kv_dtype)
        caches = []
        try:
            for layer in layers:
                shape = (limits.num_blocks, limits.block_size, layer.kv_heads, layer.head_dim)
                # calloc on a host: pages are taken when they are first written.
                keys, values = (torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(2))
                caches.append(PagedCache(keys, values))
        except RuntimeError as error:  # torch has no narrower class for every device
            total = sum(self.block_bytes(layer, limits.block_size, kv_dtype) for layer in layers) * limits.num_blocks
            raise OutOfMemory(
                f"the KV cache of {limits.num_blocks} blocks takes {total / 2**30:.2f} GiB and could not be allocated; "
                f"lower max_model_len, max_num_seqs or the cache's memory"
            ) from error
        return caches

    def plan(self, inputs: StepInputs) -> ReferencePlan:
        offsets: list[int] = inputs.query_starts[: inputs.num_spans + 1].tolist()
        lengths = [after - before for before, after in itertools.pairwise(offsets)]
        plan = ReferencePlan(
            block_size=self._block_size,
            span_rows=inputs.span_rows,
            block_tables=inputs.block_tables,
            starts=offsets[:-1],
            lengths=lengths,
            contexts=inputs.context_lengths[: inputs.num_spans].tolist(),
        )
        for span, length in enumerate(lengths):
            if length > 1:
                plan.longs.append(self._long(plan, span))
        return plan

    def _long(self, plan: ReferencePlan, span: int) -> _Span:
        size, context = self._block_size, plan.contexts[span]
        row = plan.span_rows[span].long()
        blocks = plan.block_tables[row, : -(-context // size)].long()
        slots = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()[:context]
        return _Span(plan.starts[span], plan.lengths[span], context - plan.lengths[span], slots)

    def rotate_and_store(
        self,
        qkv: Tensor,
        cache: PagedCache,
        layer: AttentionSpec,
        rotary: RotarySpec,
        qk_norm: QkNorm | None,
        inputs: StepInputs,
    ) -> Tensor:
        query, key, value = rotated_heads(qkv, layer, rotary, qk_norm, inputs.positions)
        for store, new in ((cache.keys, key), (cache.values, value)):
            store.view(-1, layer.kv_heads, layer.head_dim)[inputs.slots] = saturated(new, store.dtype)
        return query

    def attend(
        self, query: Tensor, cache: PagedCache, layer: AttentionSpec, plan: ReferencePlan, inputs: StepInputs
    ) -> Tensor:
        out = torch.zeros_like(query)
        for group in plan.singles_for(layer.window):
            out[group.tokens] = self._attend_singles(query[group.tokens], cache, layer, group)
        for span in plan.longs:
            self._attend_long(query, out, cache, layer, span)
        return out.view(query.shape[0], -1)

    def _attend_singles(self, query: Tensor, cache: PagedCache, layer: AttentionSpec, group: _Single) -> Tensor:
        """[group, heads, head_dim] of one query each."""
        kv = layer.kv_heads
        # Rows of head_dim numbers in [group, kv_heads, width] order: one gather, no transpose after it.
        index = group.slots[:, None, :] * kv + torch.arange(kv, device=group.slots.device)[None, :, None]
        shape = (*index.shape, layer.head_dim)
        keys, values = (
            store.view(-1, layer.head_dim).index_select(0, index.flatten()).view(shape).float()
            for store in (cache.keys, cache.values)
        )  # [group, kv_heads, width, head_dim]
        grouped = query.view(query.shape[0], kv, -1, layer.head_dim).float() * layer.scale
        scores = softcapped(grouped @ keys.transpose(2, 3), layer.softcap)  # [group, kv_heads, queries, width]
        scores = scores.masked_fill_(group.unseen[:, None, None, :], float("-inf"))
        # A place not seen may hold another sequence's NaN, and NaN times 0 is not 0.
        values = values.masked_fill_(group.unseen[:, None, :, None], 0.0)
        return (torch.softmax(scores, dim=-1) @ values).view(query.shape).to(query.dtype)

    def _attend_long(self, query: Tensor, out: Tensor, cache: PagedCache, layer: AttentionSpec, span: _Span) -> None:
        kv, dim = layer.kv_heads, layer.head_dim
        first = max(0, span.start - layer.window + 1) if layer.window else 0
        slots = span.slots[first:]
        keys, values = (
            store.view(-1, kv, dim).index_select(0, slots).transpose(0, 1).to(query.dtype)
            for store in (cache.keys, cache.values)
        )  # [kv_heads, context - first, head_dim]
        for piece in range(0, span.length, QUERY_PIECE):
            count = min(QUERY_PIECE, span.length - piece)
            where = slice(span.begin + piece, span.begin + piece + count)
            at = span.start + piece  # position of the piece's first query
            low = max(first, at - layer.window + 1) if layer.window else first
            high = at + count
            key_positions = torch.arange(low, high, device=query.device)
            query_positions = torch.arange(at, high, device=query.device)[:, None]
            seen = key_positions <= query_positions
            if layer.window:
                seen &= key_positions > query_positions - layer.window
            attended = attend_masked(
                query[where].view(count, kv, -1, dim).permute(1, 2, 0, 3),
                keys[:, low - first : high - first],
                values[:, low - first : high - first],
                seen,
                layer,
            )
            out[where] = attended.permute(2, 0, 1, 3).reshape(count, -1, dim)


def attend_masked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, layer: AttentionSpec) -> Tensor:
    """[kv_heads, group, queries, head_dim] over keys [kv_heads, keys, head_dim] where ``seen`` [queries, keys]."""
    kv, group, count, dim = query.shape
    # Queries that share a key head are further queries of that head: no repeated keys.
    folded = query.reshape(kv, group * count, dim)
    mask = seen.repeat(group, 1)
    if layer.softcap == 0.0:
        attended = F.scaled_dot_product_attention(folded[None], keys[None], values[None], mask, scale=layer.scale)[0]
    else:
        scores = softcapped((folded.float() * layer.scale) @ keys.float().transpose(1, 2), layer.softcap)
        scores = scores.masked_fill_(~mask, float("-inf"))
        attended = (torch.softmax(scores, dim=-1) @ values.float()).to(query.dtype)
    return attended.view(query.shape)


def rotated_heads(
    qkv: Tensor, layer: AttentionSpec, rotary: RotarySpec, qk_norm: QkNorm | None, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim]; the first two normed where that
    is given, and rotated to ``positions`` [tokens]."""
    heads = qkv.view(qkv.shape[0], layer.heads + 2 * layer.kv_heads, layer.head_dim)
    query, key, value = torch.split(heads, [layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
    if qk_norm is not None:
        query = rms_norm(query, qk_norm.query_weight, qk_norm.epsilon)
        key = rms_norm(key, qk_norm.key_weight, qk_norm.epsilon)
    cos_sin = rotary.cos_sin.index_select(0, positions)[:, None]  # [tokens, 1, rotary_dim]
    cos, sin = cos_sin.chunk(2, dim=-1)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of the leading ``2 * cos.shape[-1]`` dimensions, in float32."""
    half = cos.shape[-1]
    rotated = x[..., : 2 * half].float()
    low, high = rotated[..., :half], rotated[..., half:]
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def softcapped(scores: Tensor, softcap: float) -> Tensor:
    return scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)
