"""The attention part: a paged cache in head-major blocks, and the kernels over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepInputs
from isthmus.errors import OutOfMemory, Unsupported
from isthmus.reference.dtypes import torch_dtype
from isthmus_triton.ahead import CompileAhead, listing
from isthmus_triton.kernels.decode_attention import (
    DecodeScratch,
    SharedScratch,
    decode_attention,
    rows_for,
)
from isthmus_triton.kernels.plan import PlanBuffers, make_plan
from isthmus_triton.kernels.prefill_attention import prefill_attention
from isthmus_triton.kernels.rotate_and_store import rotate_and_store
from isthmus_triton.kernels.shared_attention import shared_attention
from isthmus_triton.launch import DecodeLaunch, LaunchTable, PrefillLaunch
from isthmus_triton.sizes import power_of_two

SHORT_SPAN: Final = 8
"""Longest span the decode kernel takes, where the group of query heads is small enough."""
SHORT_ROWS: Final = 64
"""Query rows (tokens times group) the decode kernel takes at most."""


@dataclass(frozen=True, slots=True)
class BlockCache:
    """One layer's keys and values: a block of one head is contiguous."""

    keys: Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What layers must agree on to share a plan."""

    kv_heads: int
    group: int
    window: int
    row_bytes: int

    @classmethod
    def of(cls, layer: AttentionSpec, itemsize: int) -> _Shape:
        return cls(
            kv_heads=layer.kv_heads,
            group=layer.heads // layer.kv_heads,
            window=layer.window,
            row_bytes=power_of_two(layer.head_dim) * itemsize,
        )


@dataclass(frozen=True, slots=True)
class StepPlanning:
    """A step's plans, by what layers agree on, and the longest span the decode kernel takes in it."""

    buffers: dict[_Shape, PlanBuffers]
    longest_short: dict[_Shape, int]
    any_long: dict[_Shape, bool]
    share: bool


class TritonAttention:
    """:class:`isthmus.contract.Attention`.

    ``compute_units`` is the number of the device's processors; the decode kernel's grid is a fixed
    multiple of it.  ``eight_bit_cache`` says whether the device's compiler knows 8-bit floats.
    Nothing here reads the device, so a whole step can be captured.
    """

    def __init__(
        self,
        device: torch.device,
        table: LaunchTable,
        compute_units: int,
        *,
        eight_bit_cache: bool = False,
        ahead: CompileAhead | None = None,
    ) -> None:
        self._device = device
        self._ahead = ahead or CompileAhead(device)
        self._eight_bit_cache = eight_bit_cache
        self._table = table
        self._compute_units = compute_units
        self._buffers: dict[_Shape, PlanBuffers] = {}
        self._scratch: dict[tuple[int, int, int], DecodeScratch] = {}
        self._shared: dict[tuple[int, int], SharedScratch] = {}
        self._itemsize = 2
        self._block_size = 0

    def block_bytes(self, layer: AttentionSpec, block_size: int, kv_dtype: str) -> int:
        return 2 * block_size * layer.kv_heads * layer.head_dim * torch_dtype(kv_dtype).itemsize

    def allocate(self, layers: Sequence[AttentionSpec], limits: Limits, kv_dtype: str) -> Sequence[BlockCache]:
        dtype = torch_dtype(kv_dtype)
        if dtype.itemsize == 1 and not self._eight_bit_cache:
            raise Unsupported(f"this device keeps no KV in {kv_dtype}; ask for a 16-bit dtype")
        # Tiles are computed in 16 bits at least, whatever they are read from.
        self._itemsize = max(2, dtype.itemsize)
        self._block_size = limits.block_size
        caches = []
        try:
            for layer in layers:
                shape = (limits.num_blocks, layer.kv_heads, limits.block_size, layer.head_dim)
                keys, values = (torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(2))
                caches.append(BlockCache(keys, values))
        except torch.OutOfMemoryError as error:
            total = sum(self.block_bytes(layer, limits.block_size, kv_dtype) for layer in layers) * limits.num_blocks
            raise OutOfMemory(
                f"the KV cache of {limits.num_blocks} blocks takes {total / 2**30:.2f} GiB and could not be allocated; "
                f"lower the memory fraction or max_num_seqs, or stop what else uses this device"
            ) from error
        self._allocate_plans(layers, limits)
        self._compile(layers, caches, limits, torch.bfloat16 if dtype.itemsize == 1 else dtype)
        return caches

    def _compile(
        self, layers: Sequence[AttentionSpec], caches: Sequence[BlockCache], limits: Limits, dtype: torch.dtype
    ) -> None:
        """Begin to compile what steps launch, by going through some for each kind of layer.

        A step's dtype, rotary embedding and head norms are not known yet: they are taken to be the
        usual ones, and what differs is compiled when it is first launched.
        """
        if not self._ahead.active:
            return
        kinds = dict(zip(layers, caches, strict=True))
        many = min(self._table.share_spans, limits.max_rows)
        with listing() as launches:
            for layer, cache in kinds.items():
                cos_sin = torch.zeros(1, layer.head_dim, device=self._device)
                rotary = RotarySpec(cos_sin=cos_sin, rotary_dim=layer.head_dim)
                steps = [(1, 1), (many, 1)]
                if self.takes_long(layer, dtype, cache):
                    steps.append((1, 2 * SHORT_SPAN))
                for spans, length in steps:
                    inputs = _no_inputs(spans, length, limits, self._device)
                    width = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
                    qkv = torch.zeros(inputs.num_tokens, width, dtype=dtype, device=self._device)
                    query = self.rotate_and_store(qkv, cache, layer, rotary, None, inputs)
                    self.attend(query, cache, layer, self.plan(inputs), inputs)
        self._ahead.begin(launches)

    def takes_long(self, layer: AttentionSpec, dtype: torch.dtype, cache: BlockCache) -> bool:
        """Whether :meth:`attend_long` launches kernels of this library."""
        return True

    def _allocate_plans(self, layers: Sequence[AttentionSpec], limits: Limits) -> None:
        """Everything a step needs beside the cache, so that a captured step allocates nothing of its own."""
        self._buffers.clear()
        for layer in layers:
            shape = _Shape.of(layer, self._itemsize)
            launch = self._table.decode_for(shape.row_bytes)
            programs = launch.programs_per_unit * self._compute_units
            if shape not in self._buffers:
                self._buffers[shape] = PlanBuffers.allocate(
                    programs, self._compute_units, limits.max_rows, self._device
                )
            rows = rows_for(shape.group, self._short_length(shape))
            key = (programs, rows, power_of_two(layer.head_dim))
            if key not in self._scratch:
                self._scratch[key] = DecodeScratch.allocate(*key, self._device)
            self._allocate_shared(layer, limits.max_rows)

    def _allocate_shared(self, layer: AttentionSpec, max_rows: int) -> None:
        key = (layer.heads, power_of_two(layer.head_dim))
        if not layer.window and max_rows >= self._table.share_spans and key not in self._shared:
            self._shared[key] = SharedScratch.allocate(self._compute_units, max_rows, *key, self._device)

    @staticmethod
    def _short_length(shape: _Shape) -> int:
        return max(1, min(SHORT_SPAN, SHORT_ROWS // shape.group))

    def _launches(self, shape: _Shape) -> tuple[DecodeLaunch, PrefillLaunch]:
        return self._table.decode_for(shape.row_bytes), self._table.prefill_for(shape.row_bytes)

    def plan(self, inputs: StepInputs) -> StepPlanning:
        self._ahead.wait()
        longest = inputs.max_query_length
        shorts, longs = {}, {}
        share = inputs.num_spans >= self._table.share_spans
        for shape, buffers in self._buffers.items():
            decode, prefill = self._launches(shape)
            short = self._short_length(shape)
            # Beside long spans a short one of several tokens is taken for long: one variant less to compile.
            shorts[shape] = short if 1 < longest <= short else 1
            longs[shape] = longest > shorts[shape]
            make_plan(
                buffers,
                inputs,
                kv_heads=shape.kv_heads,
                group=shape.group,
                window=shape.window,
                key_tile=decode.key_tile,
                query_tile=prefill.query_tile,
                short_length=shorts[shape],
                least_tiles=decode.least_tiles,
                block_size=self._block_size,
                share=share and not shape.window,
                least_shared=self._table.share_tiles,
            )
        return StepPlanning(self._buffers, shorts, longs, share)

    def rotate_and_store(
        self,
        qkv: Tensor,
        cache: BlockCache,
        layer: AttentionSpec,
        rotary: RotarySpec,
        qk_norm: QkNorm | None,
        inputs: StepInputs,
    ) -> Tensor:
        return rotate_and_store(
            qkv,
            cache.keys,
            cache.values,
            layer,
            rotary,
            qk_norm,
            inputs,
            heads_each=self._table.heads_each,
            overlap=self._table.overlap,
        )

    def attend(
        self, query: Tensor, cache: BlockCache, layer: AttentionSpec, plan: StepPlanning, inputs: StepInputs
    ) -> Tensor:
        shape = _Shape.of(layer, self._itemsize)
        decode, prefill = self._launches(shape)
        buffers = plan.buffers[shape]
        out = query.new_empty(query.shape[0], layer.heads * layer.head_dim)
        dim = power_of_two(layer.head_dim)
        if plan.any_long[shape] and self.attend_long(query, cache, out, layer, plan, inputs):
            return out
        shared = self._shared[layer.heads, dim] if plan.share and not layer.window else None
        if shared is not None:
            shared_attention(
                query, cache.keys, cache.values, inputs.block_tables, buffers, shared, layer, decode, prefill
            )
        scratch = self._scratch[buffers.num_programs, rows_for(shape.group, self._short_length(shape)), dim]
        decode_attention(
            query,
            cache.keys,
            cache.values,
            out,
            inputs.block_tables,
            buffers,
            scratch,
            layer,
            plan.longest_short[shape],
            decode,
            shared,
            overlap=self._table.overlap and shared is None,
        )
        return out

    def attend_long(
        self,
        query: Tensor,
        cache: BlockCache,
        out: Tensor,
        layer: AttentionSpec,
        plan: StepPlanning,
        inputs: StepInputs,
    ) -> bool:
        """Attend the long spans; returns whether nothing is left to attend."""
        shape = _Shape.of(layer, self._itemsize)
        _, prefill = self._launches(shape)
        prefill_attention(query, cache.keys, cache.values, out, plan.buffers[shape], inputs, layer, prefill)
        # Beside long spans, short ones are those of one token.
        return inputs.no_singles

    def long_lengths(self, layer: AttentionSpec, plan: StepPlanning, inputs: StepInputs) -> Tensor:
        """Tokens of each long span, and 0 for another: int32 [spans]."""
        return plan.buffers[_Shape.of(layer, self._itemsize)].long_lengths[: inputs.num_spans]


def _no_inputs(spans: int, length: int, limits: Limits, device: torch.device) -> StepInputs:
    """Of the shapes and kinds of a step's, with nothing in them."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    tokens = spans * length
    return StepInputs(
        token_ids=zeros(tokens),
        positions=zeros(tokens),
        slots=zeros(tokens, dtype=torch.int64),
        span_rows=zeros(spans),
        query_starts=zeros(spans + 1),
        context_lengths=zeros(spans),
        block_tables=zeros(1, limits.max_blocks_per_row),
        sample_tokens=zeros(spans),
        sample_rows=zeros(spans),
        num_tokens=tokens,
        num_spans=spans,
        num_samples=spans,
        max_query_length=length,
        max_context_length=limits.max_model_len,
    )
