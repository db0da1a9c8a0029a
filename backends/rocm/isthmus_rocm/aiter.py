"""AITER's unified attention for long spans: AMD's own kernels, used only where the user asks for them.

Off unless the option says ``aiter=on``: nothing of it was ever run on a device here, so there is no
figure that would choose it.  The adapter is written against one version, whose function it knows by its
arguments; another one is refused with the reason.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, StepInputs
from isthmus.errors import BackendUnavailable
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import BlockCache, StepPlanning, TritonAttention
from isthmus_triton.launch import LaunchTable

PACKAGE: Final = "amd-aiter"
VERSION: Final = "0.1.7.post2.dev18"
ROOT: Final = "aiter"
MODULE: Final = "aiter.ops.triton.unified_attention"
FUNCTION: Final = "unified_attention"
PARAMETERS: Final = (
    "q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k", "softmax_scale", "causal",
    "window_size", "block_table", "softcap", "q_descale", "k_descale", "v_descale",
)  # fmt: skip
"""Those that have to be passed, in order; more may follow that have defaults."""
ARCHITECTURES: Final = ("gfx942", "gfx950")
"""Those that this version of it knows by name."""
HEAD_DIMS: Final = (64, 96, 128)
"""For wider ones its tiles do not fit the registers: 235 of them are spilled on gfx942."""
KEY_TILE: Final = 64
"""Keys that it reads at once.  Where a block holds as many it masks none, so that what another sequence
left in the block could reach this one: such caches are left to the Triton kernels."""
FEW_KEYS: Final = 512
"""Up to so many it never splits the keys: its kernels that do mask none either, whatever the block."""

AttentionFunction = Callable[..., Any]


def find_aiter(arch: str) -> AttentionFunction:
    """AITER's function for a device of architecture ``arch``.

    The package is imported only where all else says that it can serve.  Raises
    :class:`BackendUnavailable` with the reason where it cannot.
    """
    if arch not in ARCHITECTURES:
        raise _unusable(f"its attention is for {' and '.join(ARCHITECTURES)}, not {arch}")
    spec = importlib.util.find_spec(ROOT)
    if spec is None or not spec.submodule_search_locations:
        raise _unusable(f"it is not installed; pip install {PACKAGE}=={VERSION}")
    mismatch = why_not(Path(spec.submodule_search_locations[0], *MODULE.split(".")[1:]).with_suffix(".py"))
    if mismatch:
        raise _unusable(f"{mismatch}; pip install {PACKAGE}=={VERSION}")
    try:
        function: AttentionFunction = getattr(importlib.import_module(MODULE), FUNCTION)
    except Exception as error:  # it looks at the device, starts rocminfo and loads libraries as it is imported
        raise _unusable(f"it does not load: {' '.join(str(error).split())[:120]}") from error
    return function


def _unusable(reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"AITER was asked for and cannot be used: {reason}, or leave out aiter=on")


def why_not(source: Path) -> str:
    """What in the file speaks against calling its function as this module does; empty if nothing."""
    try:
        tree = ast.parse(source.read_text())
    except (OSError, SyntaxError, ValueError):
        return f"it has no {'/'.join(source.parts[-4:])} that can be read"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION]
    if not functions:
        return f"its {source.name} has no {FUNCTION}"
    arguments = functions[0].args
    names = tuple(argument.arg for argument in (*arguments.posonlyargs, *arguments.args))
    required = names[: len(names) - len(arguments.defaults)]
    if required != PARAMETERS or arguments.posonlyargs or None in arguments.kw_defaults:
        return f"its {FUNCTION} takes other arguments ({', '.join(required)})"
    return ""


@dataclass(frozen=True, slots=True)
class _AiterPlanning(StepPlanning):
    block_tables: Tensor | None  # int32 [spans, blocks], of whole key tiles, where there may be a long span


class AiterAttention(TritonAttention):
    """:class:`TritonAttention` whose long spans AITER attends, in the dtypes and widths it knows."""

    def __init__(
        self,
        device: torch.device,
        table: LaunchTable,
        compute_units: int,
        function: AttentionFunction,
        *,
        eight_bit_cache: bool = False,
        ahead: CompileAhead | None = None,
    ) -> None:
        super().__init__(device, table, compute_units, eight_bit_cache=eight_bit_cache, ahead=ahead)
        self._unified_attention = function

    def plan(self, inputs: StepInputs) -> StepPlanning:
        plan = super().plan(inputs)
        tables = self._block_tables(inputs) if any(plan.any_long.values()) else None
        return _AiterPlanning(plan.buffers, plan.longest_short, plan.any_long, plan.share, tables)

    def _block_tables(self, inputs: StepInputs) -> Tensor:
        tile = max(KEY_TILE, self._block_size)
        used = -(-inputs.max_context_length // tile) * (tile // self._block_size)
        tables = inputs.block_tables[:, :used].index_select(0, inputs.span_rows)
        return torch.nn.functional.pad(tables, (0, used - tables.shape[1]))

    def takes_long(self, layer: AttentionSpec, dtype: torch.dtype, cache: BlockCache) -> bool:
        """What AITER is not given."""
        known = dtype == cache.keys.dtype and layer.head_dim in HEAD_DIMS
        return not known or self._block_size == KEY_TILE

    def attend_long(
        self,
        query: Tensor,
        cache: BlockCache,
        out: Tensor,
        layer: AttentionSpec,
        plan: StepPlanning,
        inputs: StepInputs,
    ) -> bool:
        """Attend all spans: AITER has no way to leave any out."""
        if self.takes_long(layer, query.dtype, cache) or not isinstance(plan, _AiterPlanning):
            return bool(super().attend_long(query, cache, out, layer, plan, inputs))
        self._unified_attention(
            q=query,
            # AITER takes [blocks, block_size, heads, head_dim] with any strides.
            k=cache.keys.transpose(1, 2),
            v=cache.values.transpose(1, 2),
            out=out.view(query.shape),
            cu_seqlens_q=inputs.query_starts,
            max_seqlen_q=inputs.max_query_length,
            seqused_k=inputs.context_lengths,
            # It only chooses between the kernels.
            max_seqlen_k=min(inputs.max_context_length, FEW_KEYS),
            softmax_scale=layer.scale,
            causal=True,
            window_size=(layer.window - 1, 0) if layer.window else (-1, -1),
            block_table=plan.block_tables,
            softcap=layer.softcap,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return True
