"""The KV cache of a compiled device, and attention over it by whichever layout the backend chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepInputs
from isthmus.errors import OutOfMemory
from isthmus.reference.attention import rotated_heads
from isthmus.reference.dtypes import torch_dtype
from isthmus_static.inputs import StaticInputs
from isthmus_static.layout import AttentionLayout, PagedCache, StaticStepInputs


class StaticAttention:
    """:class:`isthmus.contract.Attention`.  Keys and values are written in place by slot; padding goes to
    the spare block."""

    def __init__(
        self,
        device: torch.device,
        inputs: StaticInputs,
        layout: AttentionLayout,
        *,
        slot_multiple: int = 0,
        allocates_late: bool = False,
    ) -> None:
        """``slot_multiple``: a slot of the cache is its heads side by side, filled up to a multiple of so many
        numbers; 0 keeps heads apart.  ``allocates_late``: a tensor has no memory until it is looked at."""
        self._device = device
        self._inputs = inputs
        self._layout = layout
        self._slot_multiple = slot_multiple
        self._allocates_late = allocates_late

    def block_bytes(self, layer: AttentionSpec, block_size: int, kv_dtype: str) -> int:
        return 2 * block_size * math.prod(self._slot(layer)) * torch_dtype(kv_dtype).itemsize

    def allocate(self, layers: Sequence[AttentionSpec], limits: Limits, kv_dtype: str) -> Sequence[PagedCache]:
        dtype, slots = torch_dtype(kv_dtype), limits.num_blocks * limits.block_size
        try:
            caches = [
                PagedCache(*(torch.zeros(slots, *self._slot(x), dtype=dtype, device=self._device) for _ in range(2)))
                for x in layers
            ]
            for cache in caches if self._allocates_late else ():
                for store in (cache.keys, cache.values):
                    store[:1, :1].cpu()
        except (RuntimeError, MemoryError) as error:  # torch has no narrower class for every device
            total = sum(self.block_bytes(x, limits.block_size, kv_dtype) for x in layers) * limits.num_blocks
            raise OutOfMemory(
                f"the KV cache of {limits.num_blocks} blocks takes {total / 2**30:.2f} GiB and could not be allocated; "
                f"lower max_model_len, max_num_seqs or the cache's memory"
            ) from error
        self._inputs.programs.keeps("caches", [store for cache in caches for store in (cache.keys, cache.values)])
        return caches

    def plan(self, inputs: StepInputs) -> Any:
        assert isinstance(inputs, StaticStepInputs)
        return self._layout.plan(inputs, self._inputs.buffer, self._inputs.limits)

    def rotate_and_store(
        self,
        qkv: Tensor,
        cache: PagedCache,
        layer: AttentionSpec,
        rotary: RotarySpec,
        qk_norm: QkNorm | None,
        inputs: StepInputs,
    ) -> Tensor:
        query, key, value = rotated_heads(qkv, layer, rotary, qk_norm, inputs.positions.long())
        for store, new in ((cache.keys, key), (cache.values, value)):
            if store.dim() == 2:
                new = F.pad(new.flatten(1), (0, store.shape[1] - layer.kv_heads * layer.head_dim))
            store.index_copy_(0, inputs.slots, new.to(store.dtype))
        return query

    def attend(self, query: Tensor, cache: PagedCache, layer: AttentionSpec, plan: Any, inputs: StepInputs) -> Tensor:
        return self._layout.attend(query, cache, layer, plan)

    def _slot(self, layer: AttentionSpec) -> tuple[int, ...]:
        if not self._slot_multiple:
            return layer.kv_heads, layer.head_dim
        return (-(-layer.kv_heads * layer.head_dim // self._slot_multiple) * self._slot_multiple,)
