"""FlashAttention-3 for long spans, where its wheel is installed and the device is one that it serves."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, StepInputs
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import BlockCache, StepPlanning, TritonAttention
from isthmus_triton.launch import LaunchTable

MODULE: Final = "flash_attn_3"
PACKAGE: Final = "tokenspeed-fa3"
HEAD_DIMS: Final = (64, 96, 128, 192, 256)
MEASURED: Final = (
    "prefill of 128-wide heads on an H100, TFLOP/s: 585 to 621 against 404 to 490 of the Triton kernel "
    "(benchmarks/NOTES.md)"
)

FlashFunction = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class FlashProvider:
    """The function, or why there is none."""

    function: FlashFunction | None
    reason: str


def find_flash(arch: str, wanted: str) -> FlashProvider:
    """``wanted`` is "auto" or "off".  Imports the wheel's module, so only call it once a device is open."""
    if wanted == "off":
        return FlashProvider(None, "FlashAttention-3 is switched off")
    if arch != "sm_90":
        return FlashProvider(None, f"FlashAttention-3 is for sm_90, not {arch}")
    if importlib.util.find_spec(MODULE) is None:
        return FlashProvider(None, f"FlashAttention-3 is not installed; pip install {PACKAGE} makes prefill faster")
    try:
        importlib.import_module(f"{MODULE}._C")  # registers the operator with torch
    except (ImportError, OSError) as error:
        return FlashProvider(None, f"FlashAttention-3 does not load: {' '.join(str(error).split())[:120]}")
    return FlashProvider(torch.ops.flash_attn_3.fwd, f"FlashAttention-3 for long spans: {MEASURED}")


@dataclass(frozen=True, slots=True)
class _FlashPlanning(StepPlanning):
    block_tables: Tensor | None  # int32 [spans, blocks], where there may be a long span


class FlashAttention(TritonAttention):
    """:class:`TritonAttention` whose long spans FlashAttention-3 attends, in the dtypes and widths it knows."""

    def __init__(
        self,
        device: torch.device,
        table: LaunchTable,
        compute_units: int,
        function: FlashFunction,
        *,
        eight_bit_cache: bool = False,
        ahead: CompileAhead | None = None,
    ) -> None:
        super().__init__(device, table, compute_units, eight_bit_cache=eight_bit_cache, ahead=ahead)
        self._flash = function

    def plan(self, inputs: StepInputs) -> StepPlanning:
        plan = super().plan(inputs)
        used = -(-inputs.max_context_length // self._block_size)
        any_long = any(plan.any_long.values())
        tables = inputs.block_tables[:, :used].index_select(0, inputs.span_rows) if any_long else None
        return _FlashPlanning(plan.buffers, plan.longest_short, plan.any_long, plan.share, tables)

    def takes_long(self, layer: AttentionSpec, dtype: torch.dtype, cache: BlockCache) -> bool:
        """What FlashAttention does not know; over an 8-bit cache it would need 8-bit queries.

        The wheel is built without soft-capped scores.
        """
        known = dtype in (torch.bfloat16, torch.float16) and layer.head_dim in HEAD_DIMS and not layer.softcap
        return not known or cache.keys.dtype != dtype

    def attend_long(
        self,
        query: Tensor,
        cache: BlockCache,
        out: Tensor,
        layer: AttentionSpec,
        plan: StepPlanning,
        inputs: StepInputs,
    ) -> bool:
        if self.takes_long(layer, query.dtype, cache) or not isinstance(plan, _FlashPlanning):
            return super().attend_long(query, cache, out, layer, plan, inputs)
        self._flash(
            query,
            # FlashAttention takes [blocks, block_size, heads, head_dim] with any strides.
            cache.keys.transpose(1, 2),
            cache.values.transpose(1, 2),
            out=out.view(query.shape),
            cu_seqlens_q=inputs.query_starts,
            # A span of which no query is used is left alone.
            seqused_q=None if inputs.no_singles else self.long_lengths(layer, plan, inputs),
            seqused_k=inputs.context_lengths,
            max_seqlen_q=inputs.max_query_length,
            page_table=plan.block_tables,
            softmax_scale=layer.scale,
            is_causal=True,
            window_size_left=layer.window - 1 if layer.window else -1,
            window_size_right=0 if layer.window else -1,
            num_splits=1,
        )
        return inputs.no_singles
