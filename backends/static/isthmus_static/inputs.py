"""A plan on a compiled device: numpy on the host, one copy up, and slices of it inside the graph."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, StepShape
from isthmus.plan import StepPlan
from isthmus_static.layout import AttentionLayout, HostStep, StaticStepInputs
from isthmus_static.programs import Programs
from isthmus_static.step_buffer import StepBuffer

SAMPLING_INTS = ("sample_rows", "sample_positions", "sample_keys", "top_k")
SAMPLING_FLOATS = ("temperature", "top_p", "min_p")


class StaticInputs:
    """:class:`isthmus.contract.Inputs`.

    The host mirrors the block tables.  A row that begins brings its tokens and its whole table up in
    a program of its own; blocks appended later travel with the step.  The buffer has room for the
    sampling's parameters too, and is brought up when the step is built or replayed.
    """

    buffer: StepBuffer
    limits: Limits

    def __init__(self, device: torch.device, layout: AttentionLayout, programs: Programs) -> None:
        self._device = device
        self._layout = layout
        self.programs: Final = programs

    def allocate(self, limits: Limits) -> DeviceState:
        self.limits = limits
        tokens, rows = max(limits.max_tokens, limits.max_rows), limits.max_rows
        self._most_appends = rows + limits.max_tokens // limits.block_size + 1
        ints = {
            "token_rows": tokens,
            "positions": tokens,
            "slots": tokens,
            "span_rows": rows,
            "query_starts": rows + 1,
            "context_lengths": rows,
            "sample_tokens": rows,
            "append_places": self._most_appends,
            "append_ids": self._most_appends,
            **dict.fromkeys(SAMPLING_INTS, rows),
            **self._layout.sizes(limits),
        }
        self.buffer = StepBuffer(self._device, ints, dict.fromkeys(SAMPLING_FLOATS, rows))
        self.programs.feed(self.buffer)
        self._block_tables = np.zeros((rows + 1, limits.max_blocks_per_row), np.int32)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        state = DeviceState(
            tokens=zeros(rows + 1, limits.max_model_len + 1),
            block_tables=zeros(rows + 1, limits.max_blocks_per_row),
            num_prompt_tokens=zeros(rows + 1),
        )
        self.programs.keeps("rows", (state.tokens, state.block_tables, state.num_prompt_tokens))
        return state

    def upload(self, plan: StepPlan, device: DeviceState) -> None:
        started = self._apply_blocks(plan)
        self._start_rows(plan, device)
        self._write_appends(plan, started)
        self._write_spans(plan)

    def build(self, device: DeviceState, shape: StepShape) -> StaticStepInputs:
        buffer, limits = self.buffer, self.limits
        if not torch.compiler.is_compiling():
            buffer.flush()
        ints = buffer.ints
        places = buffer.take(ints, "append_places", self._most_appends).long()
        device.block_tables.view(-1).index_copy_(0, places, buffer.take(ints, "append_ids", self._most_appends))

        rows, positions = buffer.take(ints, "token_rows", shape.tokens), buffer.take(ints, "positions", shape.tokens)
        history = (rows * (limits.max_model_len + 1) + positions).long()
        return StaticStepInputs(
            token_ids=device.tokens.view(-1).index_select(0, history),
            positions=positions,
            slots=buffer.take(ints, "slots", shape.tokens).long(),
            span_rows=buffer.take(ints, "span_rows", shape.spans),
            query_starts=buffer.take(ints, "query_starts", shape.spans + 1),
            context_lengths=buffer.take(ints, "context_lengths", shape.spans),
            block_tables=device.block_tables,
            sample_tokens=buffer.take(ints, "sample_tokens", shape.samples),
            sample_rows=buffer.take(ints, "sample_rows", shape.samples),
            num_tokens=shape.tokens,
            num_spans=shape.spans,
            num_samples=shape.samples,
            max_query_length=shape.longest_span,
            max_context_length=limits.max_model_len,
            shape=shape,
            ints=ints,
        )

    def _apply_blocks(self, plan: StepPlan) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Bring the host's tables up to date; the rows that begin."""
        started = np.array([start.row for start in plan.starts], np.int32)
        self._block_tables[started] = 0
        self._block_tables[plan.block_rows, plan.block_indices] = plan.block_ids
        return started

    def _start_rows(self, plan: StepPlan, device: DeviceState) -> None:
        for start in plan.starts:
            tokens = np.zeros((1, self.limits.max_model_len + 1), np.int32)
            tokens[0, : len(start.tokens)] = start.tokens
            brought = (
                np.array([start.row], np.int32),
                tokens,
                self._block_tables[start.row : start.row + 1].copy(),
                np.array([start.num_prompt_tokens], np.int32),
            )
            self.programs.run(
                "row start",
                start_row,
                device.tokens,
                device.block_tables,
                device.num_prompt_tokens,
                *(torch.from_numpy(array).to(self._device) for array in brought),
            )

    def _write_appends(self, plan: StepPlan, started: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
        later = ~np.isin(plan.block_rows, started)
        width, spare = self.limits.max_blocks_per_row, self.limits.max_rows * self.limits.max_blocks_per_row
        self.buffer.write("append_places", (plan.block_rows * width + plan.block_indices)[later], spare)
        self.buffer.write("append_ids", plan.block_ids[later])

    def _write_spans(self, plan: StepPlan) -> None:
        limits, write = self.limits, self.buffer.write
        lengths, size, tokens = plan.span_lengths, limits.block_size, plan.num_tokens
        offsets = np.zeros(plan.num_spans + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        rows = np.repeat(plan.span_rows, lengths)
        positions = np.arange(tokens, dtype=np.int32) + np.repeat(plan.span_starts - offsets[:-1], lengths)
        sampled = np.flatnonzero(plan.span_samples)
        contexts = plan.span_starts + lengths
        write("token_rows", rows, limits.max_rows)
        write("positions", positions)
        write("slots", self._block_tables[rows, positions // size] * size + positions % size)
        write("span_rows", plan.span_rows, limits.max_rows)
        write("query_starts", offsets, tokens)
        write("context_lengths", contexts)
        write("sample_tokens", offsets[1:][sampled] - 1)
        write("sample_rows", plan.span_rows[sampled], limits.max_rows)
        write("sample_positions", contexts[sampled])
        self._layout.fill(
            self.buffer, HostStep(plan.span_rows, offsets, plan.span_starts, contexts, self._block_tables), limits
        )


def start_row(
    tokens: Tensor,
    block_tables: Tensor,
    num_prompt_tokens: Tensor,
    row: Tensor,  # int32 [1]
    its_tokens: Tensor,  # int32 [1, max_model_len + 1]
    its_blocks: Tensor,  # int32 [1, max_blocks_per_row]
    its_prompt: Tensor,  # int32 [1]
) -> Tensor:
    """Everything that a row held is void; traced."""
    where = row.long()
    tokens.index_copy_(0, where, its_tokens)
    block_tables.index_copy_(0, where, its_blocks)
    num_prompt_tokens.index_copy_(0, where, its_prompt)
    return where + 0
