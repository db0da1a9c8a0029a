"""Paged attention by compiled kernels; attention.cpp describes the cache's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepInputs
from isthmus.errors import OutOfMemory, Unsupported
from isthmus_cpu.library import Kind, Rows
from isthmus_cpu.runner import Runner

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class PanelCache:
    """One layer's keys and values."""

    keys: Tensor  # uint8
    values: Tensor  # uint8
    layout: tuple[int, ...]
    """The kernels' first seven integers."""


class PanelAttention:
    """:class:`isthmus.contract.Attention`.  Scores are float32; the cache is bfloat16 or float32."""

    def __init__(self, runner: Runner, value_padding: int) -> None:
        self._runner = runner
        self._value_padding = value_padding
        self._tile_starts = torch.zeros(2, dtype=torch.int32)

    def block_bytes(self, layer: AttentionSpec, block_size: int, kv_dtype: str) -> int:
        keys, values = self._widths(layer)
        return (keys + values) * layer.kv_heads * block_size * ELEMENT_BYTES[kv_dtype]

    def allocate(self, layers: Sequence[AttentionSpec], limits: Limits, kv_dtype: str) -> Sequence[PanelCache]:
        if kv_dtype not in ELEMENT_BYTES:
            raise Unsupported(f"the cpu backend keeps keys and values as {', '.join(ELEMENT_BYTES)}, not {kv_dtype}")
        self._tile_starts = torch.zeros(limits.max_rows + 2, dtype=torch.int32)
        try:
            return [self._cache(layer, limits, kv_dtype) for layer in layers]
        except MemoryError as error:
            total = sum(self.block_bytes(layer, limits.block_size, kv_dtype) for layer in layers) * limits.num_blocks
            raise OutOfMemory(
                f"the KV cache of {limits.num_blocks} blocks takes {total / 2**30:.2f} GiB and could not be allocated; "
                f"lower max_model_len, max_num_seqs or the cache's memory"
            ) from error

    def plan(self, inputs: StepInputs) -> Tensor:
        self._runner.run(
            Kind.PLAN_ATTENTION,
            inputs.query_starts,
            (inputs.query_starts, self._tile_starts),
            rows=inputs.num_spans,
            rows_from=Rows.SPANS,
        )
        return self._tile_starts

    def rotate_and_store(
        self,
        qkv: Tensor,
        cache: PanelCache,
        layer: AttentionSpec,
        rotary: RotarySpec,
        qk_norm: QkNorm | None,
        inputs: StepInputs,
    ) -> Tensor:
        assert qkv.is_contiguous() and rotary.cos_sin.is_contiguous()
        query = self._runner.empty(qkv, qkv.shape[0], layer.heads, layer.head_dim)
        self._runner.run(
            Kind.ROTATE_STORE,
            qkv,
            (
                *(qkv, cache.keys, cache.values, query, inputs.positions, inputs.slots, rotary.cos_sin),
                *((None, None) if qk_norm is None else (qk_norm.query_weight, qk_norm.key_weight)),
            ),
            (*cache.layout, 0, rotary.rotary_dim),
            (0.0 if qk_norm is None else qk_norm.epsilon,),
        )
        return query

    def attend(
        self, query: Tensor, cache: PanelCache, layer: AttentionSpec, plan: Tensor, inputs: StepInputs
    ) -> Tensor:
        assert query.is_contiguous()
        out = self._runner.empty(query, query.shape[0], layer.heads * layer.head_dim)
        self._runner.run(
            Kind.ATTEND,
            query,
            (
                *(query, cache.keys, cache.values, out, inputs.query_starts, inputs.context_lengths),
                *(inputs.span_rows, inputs.block_tables, plan),
            ),
            (*cache.layout, inputs.block_tables.shape[1]),
            (layer.scale, layer.softcap),
            rows=inputs.num_spans,
            rows_from=Rows.SPANS,
        )
        return out

    def _widths(self, layer: AttentionSpec) -> tuple[int, int]:
        """Head dimension of a cached key, and of a cached value."""
        if layer.head_dim % 2 != 0:
            raise Unsupported(f"the cpu backend's kernels need an even head dimension, not {layer.head_dim}")
        return layer.head_dim, -(-layer.head_dim // self._value_padding) * self._value_padding

    def _cache(self, layer: AttentionSpec, limits: Limits, kv_dtype: str) -> PanelCache:
        keys, values = self._widths(layer)
        heads = limits.num_blocks * layer.kv_heads * limits.block_size * ELEMENT_BYTES[kv_dtype]
        layout = (layer.heads, layer.kv_heads, layer.head_dim, values, limits.block_size, layer.window)
        # numpy's zeros are pages that the system has not given yet: only what is used is resident.
        memory = [torch.from_numpy(np.zeros(heads * width, np.uint8)) for width in (keys, values)]
        return PanelCache(memory[0], memory[1], (*layout, kv_dtype == "bfloat16"))
