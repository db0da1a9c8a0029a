"""The inputs part: one packed copy up a step, and everything a token needs worked out on the device."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, StepInputs, StepShape
from isthmus.plan import Int32Array, RowStart, StepPlan
from isthmus.sampling_params import RowSampling
from isthmus_triton.ahead import CompileAhead, launching, listing
from isthmus_triton.kernels.prepare import append_blocks_kernel, build_kernel, start_rows_kernel
from isthmus_triton.sizes import tiles_of

HISTORY_ALIGNMENT: Final = 16
"""Rows of the history begin at multiples of this, so that kernels may load several tokens at once."""
APPEND_BLOCK: Final = 128


def history_width(limits: Limits) -> int:
    """Tokens from one row of the history to the next."""
    return -(-(limits.max_model_len + 1) // HISTORY_ALIGNMENT) * HISTORY_ALIGNMENT


class _Layout:
    """Where each array of a step lies in the packed int32 buffer: fixed, so that views never move."""

    def __init__(self, max_rows: int) -> None:
        names = ("span_rows", "query_starts", "span_starts", "context_lengths", "sample_tokens", "sample_rows")
        self.width: Final = -(-(max_rows + 1) // 16) * 16
        self.slices: Final = {
            name: slice(index * self.width, (index + 1) * self.width) for index, name in enumerate(names)
        }
        self.total: Final = len(names) * self.width


class TritonInputs:
    """:class:`isthmus.contract.Inputs`.

    :meth:`build` does device work alone, on buffers that never move, so it can be captured;
    :meth:`upload` queues its copies and changes before whatever runs the step.
    """

    def __init__(self, device: torch.device, ahead: CompileAhead | None = None) -> None:
        self._device = device
        self._ahead = ahead or CompileAhead(device)

    def allocate(self, limits: Limits) -> DeviceState:
        self._limits = limits
        self._layout = _Layout(limits.max_rows)
        self._packed = self._zeros(self._layout.total)
        self._tensors = {name: self._packed[where] for name, where in self._layout.slices.items()}
        self._token_ids = self._zeros(limits.max_tokens)
        self._positions = self._zeros(limits.max_tokens)
        self._slots = torch.zeros(limits.max_tokens, dtype=torch.int64, device=self._device)
        self._max_query_length = 1
        self._max_context_length = 1
        self._no_singles = False
        rows = limits.max_rows + 1
        state = DeviceState(
            tokens=self._zeros(rows, history_width(limits))[:, : limits.max_model_len + 1],
            block_tables=self._zeros(rows, limits.max_blocks_per_row),
            num_prompt_tokens=self._zeros(rows),
        )
        self._compile(state)
        return state

    def _compile(self, state: DeviceState) -> None:
        """Begin to compile what a step launches, by going through one whose row starts and grows."""
        if not self._ahead.active:
            return
        one, nothing = np.ones(1, np.int32), np.zeros(1, np.int32)
        start = RowStart(row=0, tokens=nothing, num_prompt_tokens=1, sampling=RowSampling(max_tokens=1))
        plan = StepPlan(
            step=0, starts=(start,), block_rows=nothing, block_indices=nothing, block_ids=nothing,
            span_rows=nothing, span_starts=nothing, span_lengths=one, span_samples=one.astype(np.bool_),
        )  # fmt: skip
        with listing() as launches:
            self._change(plan, state)
            self.build(state, StepShape(1, 1, 1))
        self._ahead.begin(launches)

    def upload(self, plan: StepPlan, device: DeviceState) -> None:
        self._ahead.wait()
        self._change(plan, device)
        # A pinned buffer of torch's own: not used again before the copy out of it has ended.
        packed = self._host_buffer(self._layout.total)
        self._write_spans(plan, packed.numpy())
        self._packed.copy_(packed, non_blocking=True)

    def _change(self, plan: StepPlan, device: DeviceState) -> None:
        if plan.starts:
            self._apply_starts(plan, device)
        if len(plan.block_ids):
            self._apply_blocks(plan, device)

    def build(self, device: DeviceState, shape: StepShape) -> StepInputs:
        num_tokens, num_spans, num_samples = shape.tokens, shape.spans, shape.samples
        of = self._tensors
        token_ids, positions = self._token_ids[:num_tokens], self._positions[:num_tokens]
        slots = self._slots[:num_tokens]
        launching(build_kernel, (num_spans + 1,))(
            of["span_rows"], of["span_starts"], of["query_starts"], device.tokens, device.block_tables,
            token_ids, positions, slots, num_spans, num_tokens, device.tokens.stride(0),
            device.block_tables.stride(0), BLOCK_SIZE=self._limits.block_size, BLOCK=512, num_warps=4,
        )  # fmt: skip
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
            no_singles=self._no_singles,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def _host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type != "cpu")

    def _up(self, arrays: list[Int32Array]) -> Tensor:
        """The arrays one after another, on the device."""
        host = self._host_buffer(sum(map(len, arrays)))
        np.concatenate(arrays, out=host.numpy())
        return host.to(self._device, non_blocking=True)

    def _apply_starts(self, plan: StepPlan, device: DeviceState) -> None:
        starts = plan.starts
        lengths = np.array([len(start.tokens) for start in starts], np.int32)
        headers = np.zeros((len(starts), 4), np.int32)
        headers[:, 0] = [start.row for start in starts]
        headers[:, 1] = [start.num_prompt_tokens for start in starts]
        headers[:, 2] = headers.size + np.cumsum(lengths) - lengths
        headers[:, 3] = lengths
        changes = self._up([headers.ravel(), *(start.tokens for start in starts)])
        pieces = min(16, tiles_of(int(lengths.max()), 1024))
        launching(start_rows_kernel, (len(starts), max(1, pieces)))(
            changes, changes, device.tokens, device.block_tables, device.num_prompt_tokens, len(starts),
            device.tokens.stride(0), device.block_tables.stride(0), device.block_tables.shape[1],
            BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def _apply_blocks(self, plan: StepPlan, device: DeviceState) -> None:
        appends = len(plan.block_ids)
        changes = self._up([plan.block_rows, plan.block_indices, plan.block_ids])
        launching(append_blocks_kernel, (tiles_of(appends, APPEND_BLOCK),))(
            changes, device.block_tables, appends, device.block_tables.stride(0), BLOCK=APPEND_BLOCK, num_warps=4
        )

    def _write_spans(self, plan: StepPlan, packed: Int32Array) -> None:
        """Padding everywhere, then the plan: padded spans have no length, padded samples name the padding row."""
        packed[:] = 0
        of = {name: packed[where] for name, where in self._layout.slices.items()}
        spans = plan.num_spans
        offsets = np.zeros(spans + 1, np.int32)
        np.cumsum(plan.span_lengths, out=offsets[1:])
        contexts = plan.span_starts + plan.span_lengths
        sampled = np.flatnonzero(plan.span_samples)
        of["span_rows"][:] = self._limits.max_rows
        of["span_rows"][:spans] = plan.span_rows
        of["query_starts"][: spans + 1] = offsets
        of["query_starts"][spans + 1 :] = offsets[-1]
        of["span_starts"][:spans] = plan.span_starts
        of["context_lengths"][:spans] = contexts
        of["sample_tokens"][: len(sampled)] = offsets[1:][sampled] - 1
        of["sample_rows"][:] = self._limits.max_rows
        of["sample_rows"][: len(sampled)] = plan.span_rows[sampled]
        self._max_query_length = int(plan.span_lengths.max(initial=1))
        self._max_context_length = int(contexts.max(initial=1))
        self._no_singles = spans > 0 and int(plan.span_lengths.min()) > 1
