"""A step's inputs, written in place: host and device are the same memory."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.contract import DeviceState, Limits, StepInputs
from isthmus.plan import StepPlan
from isthmus_cpu.library import Counts, Rows


class _Buffer:
    """One array, as numpy and as torch see it."""

    def __init__(self, *shape: int, dtype: type = np.int32) -> None:
        self.array: Final[NDArray[np.int32]] = np.zeros(shape, dtype)
        self.tensor: Final[Tensor] = torch.from_numpy(self.array)


class PanelInputs:
    """:class:`isthmus.contract.Inputs`.  ``counts`` is what a captured graph reads at each replay."""

    def __init__(self) -> None:
        self.counts: Final = Counts()

    def allocate(self, limits: Limits) -> DeviceState:
        rows, tokens, spans = limits.max_rows + 1, limits.max_tokens, limits.max_rows
        self._limits = limits
        self._token_ids, self._positions = _Buffer(tokens), _Buffer(tokens)
        self._slots = _Buffer(tokens, dtype=np.int64)
        self._span_rows, self._context_lengths = _Buffer(spans), _Buffer(spans)
        self._query_starts = _Buffer(spans + 1)
        self._sample_tokens, self._sample_rows = _Buffer(spans), _Buffer(spans)
        self._token_rows = np.zeros(tokens, np.int32)
        self._history = _Buffer(rows, limits.max_model_len + 1)
        self._block_tables = _Buffer(rows, limits.max_blocks_per_row)
        self._num_prompt_tokens = _Buffer(rows)
        self._num_tokens = self._num_spans = self._num_samples = 0
        self._max_query_length = self._max_context_length = 0
        return DeviceState(
            tokens=self._history.tensor,
            block_tables=self._block_tables.tensor,
            num_prompt_tokens=self._num_prompt_tokens.tensor,
        )

    def row_counts(self) -> dict[int, Rows]:
        """Addresses of the inputs of variable length, and which count that length is."""
        return {
            self._token_ids.tensor.data_ptr(): Rows.TOKENS,
            self._positions.tensor.data_ptr(): Rows.TOKENS,
            self._sample_tokens.tensor.data_ptr(): Rows.SAMPLES,
            self._sample_rows.tensor.data_ptr(): Rows.SAMPLES,
            self._query_starts.tensor.data_ptr(): Rows.SPANS,
        }

    def upload(self, plan: StepPlan, device: DeviceState) -> None:
        for start in plan.starts:
            self._history.array[start.row, : len(start.tokens)] = start.tokens
            self._num_prompt_tokens.array[start.row] = start.num_prompt_tokens
            self._block_tables.array[start.row] = 0
        if len(plan.block_ids):
            self._block_tables.array[plan.block_rows, plan.block_indices] = plan.block_ids
        self._write_spans(plan)

    def _write_spans(self, plan: StepPlan) -> None:
        lengths, rows, size = plan.span_lengths, plan.span_rows, self._limits.block_size
        spans, tokens = len(rows), int(lengths.sum())
        contexts = plan.span_starts + lengths
        ends = np.cumsum(lengths, dtype=np.int32)
        if tokens == spans:  # every span is one token
            token_rows, positions = rows, plan.span_starts
        else:
            token_rows = np.repeat(rows, lengths)
            positions = np.arange(tokens, dtype=np.int32) + np.repeat(contexts - ends, lengths)
        blocks = self._block_tables.array[token_rows, positions // size]
        self._token_rows[:tokens] = token_rows
        self._positions.array[:tokens] = positions
        self._slots.array[:tokens] = blocks.astype(np.int64) * size + positions % size
        self._span_rows.array[:spans] = rows
        self._context_lengths.array[:spans] = contexts
        self._query_starts.array[1 : spans + 1] = ends
        samples = int(plan.span_samples.sum())
        self._sample_tokens.array[:samples] = ends[plan.span_samples] - 1
        self._sample_rows.array[:samples] = rows[plan.span_samples]
        self._num_tokens, self._num_spans, self._num_samples = tokens, spans, samples
        self._max_query_length = int(lengths.max(initial=0))
        self._max_context_length = int(contexts.max(initial=0))

    def build(self, device: DeviceState, num_tokens: int, num_spans: int, num_samples: int) -> StepInputs:
        tokens, spans, samples = self._num_tokens, self._num_spans, self._num_samples
        self._token_ids.array[:tokens] = self._history.array[self._token_rows[:tokens], self._positions.array[:tokens]]
        if (num_tokens, num_spans, num_samples) != (tokens, spans, samples):
            self._pad(num_tokens, num_spans, num_samples)
        self.counts.tokens, self.counts.spans, self.counts.samples = tokens, spans, samples
        return StepInputs(
            token_ids=self._token_ids.tensor[:num_tokens],
            positions=self._positions.tensor[:num_tokens],
            slots=self._slots.tensor[:num_tokens],
            span_rows=self._span_rows.tensor[:num_spans],
            query_starts=self._query_starts.tensor[: num_spans + 1],
            context_lengths=self._context_lengths.tensor[:num_spans],
            block_tables=device.block_tables,
            sample_tokens=self._sample_tokens.tensor[:num_samples],
            sample_rows=self._sample_rows.tensor[:num_samples],
            num_tokens=num_tokens,
            num_spans=num_spans,
            num_samples=num_samples,
            max_query_length=self._max_query_length,
            max_context_length=self._max_context_length,
        )

    def _pad(self, num_tokens: int, num_spans: int, num_samples: int) -> None:
        """Tokens and samples of the padding row, spans of no length, slots of the spare block."""
        tokens, spans, samples, padding = self._num_tokens, self._num_spans, self._num_samples, self._limits.max_rows
        for buffer in (self._token_ids, self._positions, self._slots):
            buffer.array[tokens:num_tokens] = 0
        self._span_rows.array[spans:num_spans] = padding
        self._context_lengths.array[spans:num_spans] = 0
        self._query_starts.array[spans + 1 : num_spans + 1] = tokens
        self._sample_tokens.array[samples:num_samples] = 0
        self._sample_rows.array[samples:num_samples] = padding
