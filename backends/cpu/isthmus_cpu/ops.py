"""The arithmetic of a layer by compiled kernels.  Hidden tensors are float32; weights are packed once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import LinearWeight
from isthmus.errors import Unsupported
from isthmus_cpu.library import Epilogue, Kind, Library
from isthmus_cpu.pages import Slabs
from isthmus_cpu.runner import Runner

ACTIVATIONS: Final = {"silu": Epilogue.SILU, "gelu_tanh": Epilogue.GELU_TANH}
KINDS: Final = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class PanelLinear:
    """A weight in panels of output columns; see linear.cpp."""

    packed: Tensor  # uint8, one or several weights of the same shape after each other
    bias: Tensor | None  # float32 [out]
    out_features: int
    in_features: int
    half: bool
    """bfloat16, else float32."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32


@dataclass(frozen=True, slots=True)
class PanelExperts:
    gate_up: PanelLinear
    down: PanelLinear
    num_experts: int


class PanelOps:
    """:class:`isthmus.contract.Ops` over packed panels.

    :meth:`add_rms_norm` and :meth:`add` write the sum into ``residual``, and the norm into ``x``.
    :meth:`logits` returns memory that its next call writes again.
    """

    def __init__(self, library: Library, runner: Runner, threads: int) -> None:
        self._library = library
        self._runner = runner
        self._packers = ThreadPoolExecutor(threads, thread_name_prefix="isthmus-pack")
        self._threads = threads
        self._slabs = Slabs()

    def close(self) -> None:
        self._packers.shutdown()

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> PanelLinear:
        return self._pack(weight[None], bias)

    def prepare_embedding(self, weight: Tensor) -> tuple[Any, LinearWeight]:
        packed = self.prepare_linear(weight)
        return packed, packed

    def prepare_table(self, weight: Tensor) -> Any:
        return self.prepare_linear(weight)

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return weight.to(torch.float32).contiguous()

    def embed(self, token_ids: Tensor, table: PanelLinear, scale: float) -> Tensor:
        width = table.in_features
        hidden = self._runner.empty(token_ids, token_ids.shape[0], width)
        # The factor is rounded to the weights' dtype first: checkpoints were trained that way.
        rounded = scale if scale == 1.0 or not table.half else round_to_bfloat16(scale)
        self._runner.run(Kind.EMBED, token_ids, (token_ids, table.packed, hidden), (width, table.half), (rounded,))
        return hidden

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        assert isinstance(weight, PanelLinear)
        y = self._runner.empty(x, x.shape[0], weight.out_features)
        self._multiply(x, weight, y)
        return y

    def logits(self, hidden: Tensor, weight: LinearWeight, softcap: float) -> Tensor:
        assert isinstance(weight, PanelLinear)
        logits = self._runner.reused(hidden, hidden.shape[0], weight.out_features)
        self._multiply(hidden, weight, logits)
        if softcap != 0.0:
            self._runner.run(Kind.SOFTCAP, logits, (logits,), (logits.shape[1],), (softcap,))
        return logits

    def _multiply(self, x: Tensor, weight: PanelLinear, y: Tensor) -> None:
        out, depth = weight.out_features, weight.in_features
        assert x.is_contiguous() and x.shape[1] == depth, (x.shape, out, depth)
        self._runner.run(
            Kind.LINEAR, x, (x, weight.packed, weight.bias, y), (out, depth, weight.half, Epilogue.NONE, depth, out)
        )

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        assert x.is_contiguous()
        y = self._runner.empty(x, *x.shape)
        self._runner.run(Kind.RMS_NORM, x, (x, weight, y), (x.shape[1],), (epsilon,))
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous() and residual.is_contiguous()
        self._runner.run(Kind.ADD_RMS_NORM, x, (x, residual, weight, x), (x.shape[1],), (epsilon,))
        return x, residual

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        assert x.is_contiguous() and residual.is_contiguous()
        self._runner.run(Kind.ADD, x, (x, residual), (x.shape[1],))
        return residual

    def gated_activation(self, gate_up: Tensor, activation: str) -> Tensor:
        assert gate_up.is_contiguous()
        inner = gate_up.shape[1] // 2
        y = self._runner.empty(gate_up, gate_up.shape[0], inner)
        self._runner.run(Kind.GATED, gate_up, (gate_up, y), (inner, ACTIVATIONS[activation]))
        return y

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        assert x.is_contiguous()
        y = self._runner.empty(index, index.shape[0], x.shape[1])
        self._runner.run(Kind.TAKE_ROWS, index, (x, index, y), (x.shape[1],))
        return y

    def prepare_experts(self, gate_up: Tensor, down: Tensor) -> PanelExperts:
        experts, double, hidden = gate_up.shape
        inner = double // 2
        # Gate and up panels are multiplied side by side, so that each must begin at a panel's edge.
        wide = -(-inner // self._library.panel) * self._library.panel
        if wide != inner:
            padded = gate_up.new_zeros(experts, 2, wide, hidden)
            padded[:, :, :inner] = gate_up.view(experts, 2, inner, hidden)
            gate_up = padded.view(experts, 2 * wide, hidden)
            down = torch.nn.functional.pad(down, (0, wide - inner))
        return PanelExperts(self._pack(gate_up, None), self._pack(down, None), experts)

    def experts(
        self, x: Tensor, router_logits: Tensor, weights: PanelExperts, *, top_k: int, renormalize: bool, activation: str
    ) -> Tensor:
        assert x.is_contiguous() and router_logits.is_contiguous()
        rows, hidden = x.shape
        inner, count = weights.down.in_features, weights.num_experts
        y = self._runner.empty(x, rows, hidden)
        scratch = self._runner.empty(x, count + 1 + rows * top_k * (3 + inner + hidden))
        each = (weights.gate_up.packed.numel() // count, weights.down.packed.numel() // count)
        self._runner.run(
            Kind.EXPERTS,
            x,
            (x, router_logits, weights.gate_up.packed, weights.down.packed, y, scratch),
            (hidden, inner, count, top_k, renormalize, ACTIVATIONS[activation], weights.gate_up.half, *each),
        )
        return y

    def _pack(self, weights: Tensor, bias: Tensor | None) -> PanelLinear:
        """``weights`` is [count, out, in]."""
        count, out, depth = weights.shape
        kind = KINDS.get(weights.dtype)
        if kind is None:
            raise Unsupported(f"the cpu backend keeps weights as bfloat16 or float32, not {weights.dtype}")
        weights = weights.contiguous()
        each = int(self._library.calls.isthmus_packed_bytes(out, depth, kind))
        packed = self._slabs.take(count * each)
        panels = -(-out // self._library.panel)
        step = max(1, -(-panels // self._threads))

        def pack(number: int, first: int) -> None:
            self._library.calls.isthmus_pack(
                weights[number].data_ptr(),
                *(out, depth, packed.data_ptr() + number * each, kind, first, min(first + step, panels)),
            )

        jobs = [(number, first) for number in range(count) for first in range(0, panels, step)]
        list(self._packers.map(lambda job: pack(*job), jobs))
        kept = None if bias is None else bias.to(torch.float32).contiguous()
        return PanelLinear(packed, kept, out, depth, kind == 1)


def round_to_bfloat16(value: float) -> float:
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
