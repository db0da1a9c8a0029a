"""A step's inputs, computed on the host with numpy and brought to the device in one copy."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, StepInputs, StepShape
from isthmus.plan import Int32Array, StepPlan


class _Layout:
    """Where each array of a step lies in the packed int32 buffer: fixed, so that views never move."""

    def __init__(self, limits: Limits) -> None:
        tokens, spans = limits.max_tokens, limits.max_rows
        self.sizes: Final = {
            "token_rows": tokens,
            "positions": tokens,
            "slots": tokens,
            "span_rows": spans,
            "query_starts": spans + 1,
            "context_lengths": spans,
            "sample_tokens": spans,
            "sample_rows": spans,
        }
        ends = np.cumsum(list(self.sizes.values()))
        self.total: Final = int(ends[-1])
        self.slices: Final = {
            name: slice(int(end) - size, int(end)) for (name, size), end in zip(self.sizes.items(), ends, strict=True)
        }


class ReferenceInputs:
    """:class:`isthmus.contract.Inputs`.

    The host mirrors the block tables, so a step's slots are computed there; tokens are read from
    ``device.tokens`` when :meth:`build` runs, since the host may not know them yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, limits: Limits) -> DeviceState:
        self._limits = limits
        self._layout = _Layout(limits)
        self._host = np.zeros(self._layout.total, np.int32)
        self._packed = torch.zeros(self._layout.total, dtype=torch.int32, device=self._device)
        self._arrays = {name: self._host[where] for name, where in self._layout.slices.items()}
        self._tensors = {name: self._packed[where] for name, where in self._layout.slices.items()}
        self._token_ids = torch.zeros(limits.max_tokens, dtype=torch.int32, device=self._device)
        self._slots = torch.zeros(limits.max_tokens, dtype=torch.int64, device=self._device)
        self._block_tables = np.zeros((limits.max_rows + 1, limits.max_blocks_per_row), np.int32)
        self._max_query_length = self._max_context_length = 0
        self._clear()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        rows = limits.max_rows + 1
        return DeviceState(
            tokens=zeros(rows, limits.max_model_len + 1),
            block_tables=zeros(rows, limits.max_blocks_per_row),
            num_prompt_tokens=zeros(rows),
        )

    def upload(self, plan: StepPlan, device: DeviceState) -> None:
        self._apply_starts(plan, device)
        self._apply_blocks(plan, device)
        self._write_spans(plan)
        self._packed.copy_(torch.from_numpy(self._host))

    def build(self, device: DeviceState, shape: StepShape) -> StepInputs:
        num_tokens, num_spans, num_samples = shape.tokens, shape.spans, shape.samples
        of = self._tensors
        token_rows, positions = of["token_rows"][:num_tokens], of["positions"][:num_tokens]
        token_ids, slots = self._token_ids[:num_tokens], self._slots[:num_tokens]
        token_ids.copy_(device.tokens[token_rows, positions])
        slots.copy_(of["slots"][:num_tokens])
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            span_rows=of["span_rows"][:num_spans],
            query_starts=of["query_starts"][: num_spans + 1],
            context_lengths=of["context_lengths"][:num_spans],
            block_tables=device.block_tables,
            sample_tokens=of["sample_tokens"][:num_samples],
            sample_rows=of["sample_rows"][:num_samples],
            num_tokens=num_tokens,
            num_spans=num_spans,
            num_samples=num_samples,
            max_query_length=self._max_query_length,
            max_context_length=self._max_context_length,
        )

    def _clear(self) -> None:
        """Padding everywhere: tokens and samples of the padding row, spans of no length, slot 0."""
        self._host[:] = 0
        for name in ("token_rows", "span_rows", "sample_rows"):
            self._arrays[name][:] = self._limits.max_rows

    def _apply_starts(self, plan: StepPlan, device: DeviceState) -> None:
        for start in plan.starts:
            device.tokens[start.row, : len(start.tokens)] = torch.from_numpy(np.array(start.tokens, np.int32)).to(
                self._device
            )
            device.num_prompt_tokens[start.row] = start.num_prompt_tokens
            device.block_tables[start.row] = 0
            self._block_tables[start.row] = 0

    def _apply_blocks(self, plan: StepPlan, device: DeviceState) -> None:
        if len(plan.block_ids) == 0:
            return
        self._block_tables[plan.block_rows, plan.block_indices] = plan.block_ids
        appended = torch.from_numpy(np.stack((plan.block_rows, plan.block_indices, plan.block_ids)))
        rows, indices, ids = appended.to(self._device).unbind()
        device.block_tables[rows, indices] = ids

    def _write_spans(self, plan: StepPlan) -> None:
        self._clear()
        lengths, size = plan.span_lengths, self._limits.block_size
        spans, tokens = plan.num_spans, plan.num_tokens
        offsets = np.zeros(spans + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        rows = np.repeat(plan.span_rows, lengths)
        positions = np.arange(tokens, dtype=np.int32) + np.repeat(plan.span_starts - offsets[:-1], lengths)
        sampled = np.flatnonzero(plan.span_samples)
        contexts = plan.span_starts + lengths

        self._put("token_rows", rows)
        self._put("positions", positions)
        self._put("slots", self._block_tables[rows, positions // size] * size + positions % size)
        self._put("span_rows", plan.span_rows)
        self._put("query_starts", offsets)
        self._arrays["query_starts"][spans + 1 :] = tokens
        self._put("context_lengths", contexts)
        self._put("sample_tokens", offsets[1:][sampled] - 1)
        self._put("sample_rows", plan.span_rows[sampled])
        self._max_query_length = int(lengths.max(initial=0))
        self._max_context_length = int(contexts.max(initial=0))

    def _put(self, name: str, values: Int32Array) -> None:
        self._arrays[name][: len(values)] = values
