"""A step's inputs, written in place: host and device are the same memory."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.contract import DeviceState, Limits, StepInputs, StepShape
from isthmus.plan import StepPlan
from isthmus_cpu.library import Counts, Library, Rows

KEPT_SHAPES: Final = 512
"""Steps whose views are kept for the next one of the same size."""


class Buffers(ctypes.Structure):
    """As ``Buffers`` in inputs.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "span_rows", "query_starts")),
        *((name, ctypes.c_void_p) for name in ("context_lengths", "sample_tokens", "sample_rows", "token_rows")),
        *((name, ctypes.c_void_p) for name in ("history", "tables")),
        *((name, ctypes.c_int64) for name in ("history_width", "table_width", "block_size", "max_rows")),
        *((name, ctypes.c_int64) for name in ("tokens", "spans", "samples", "longest_query", "longest_context")),
    )


class PanelInputs:
    """:class:`isthmus.contract.Inputs`.  ``counts`` is what a captured graph reads at each replay."""

    def __init__(self, library: Library) -> None:
        self._calls = library.calls
        self.counts: Final = Counts()

    def allocate(self, limits: Limits) -> DeviceState:
        rows, tokens, spans = limits.max_rows + 1, limits.max_tokens, limits.max_rows

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        self._of: dict[str, Tensor] = {
            "token_ids": zeros(tokens),
            "positions": zeros(tokens),
            "slots": zeros(tokens, dtype=torch.int64),
            "span_rows": zeros(spans),
            "query_starts": zeros(spans + 1),
            "context_lengths": zeros(spans),
            "sample_tokens": zeros(spans),
            "sample_rows": zeros(spans),
            "token_rows": zeros(tokens),
            "history": zeros(rows, limits.max_model_len + 1),
            "tables": zeros(rows, limits.max_blocks_per_row),
        }
        self._num_prompt_tokens = zeros(rows)
        self._history: NDArray[np.int32] = self._of["history"].numpy()
        self._tables: NDArray[np.int32] = self._of["tables"].numpy()
        self._buffers = Buffers(
            **{name: tensor.data_ptr() for name, tensor in self._of.items()},
            history_width=limits.max_model_len + 1,
            table_width=limits.max_blocks_per_row,
            block_size=limits.block_size,
            max_rows=limits.max_rows,
            # As if all had been filled: the first plan makes padding of what it does not use.
            tokens=tokens,
            spans=spans,
            samples=spans,
        )
        self._shapes: dict[tuple[int, int, int], StepInputs] = {}
        return DeviceState(
            tokens=self._of["history"], block_tables=self._of["tables"], num_prompt_tokens=self._num_prompt_tokens
        )

    def row_counts(self) -> dict[int, Rows]:
        """Addresses of the inputs of variable length, and which count that length is."""
        counts = {
            "token_ids": Rows.TOKENS,
            "positions": Rows.TOKENS,
            "query_starts": Rows.SPANS,
            "sample_tokens": Rows.SAMPLES,
            "sample_rows": Rows.SAMPLES,
        }
        return {self._of[name].data_ptr(): rows for name, rows in counts.items()}

    def upload(self, plan: StepPlan, device: DeviceState) -> None:
        for start in plan.starts:
            self._history[start.row, : len(start.tokens)] = start.tokens
            self._num_prompt_tokens[start.row] = start.num_prompt_tokens
            self._tables[start.row] = 0
        self._calls.isthmus_prepare(
            ctypes.byref(self._buffers),
            len(plan.block_ids),
            *(address(plan.block_rows), address(plan.block_indices), address(plan.block_ids)),
            len(plan.span_rows),
            *(address(plan.span_rows), address(plan.span_starts), address(plan.span_lengths)),
            address(plan.span_samples, np.bool_),
        )

    def build(self, device: DeviceState, shape: StepShape) -> StepInputs:
        num_tokens, num_spans, num_samples = shape.tokens, shape.spans, shape.samples
        """The object may be the one that an earlier call returned, brought up to date."""
        buffers, counts = self._buffers, self.counts
        self._calls.isthmus_read_tokens(ctypes.byref(buffers))
        counts.tokens, counts.spans, counts.samples = buffers.tokens, buffers.spans, buffers.samples
        shape = (num_tokens, num_spans, num_samples)
        inputs = self._shapes.get(shape)
        if inputs is None:
            if len(self._shapes) >= KEPT_SHAPES:
                self._shapes.clear()
            inputs = self._shapes[shape] = self._views(*shape)
        inputs.max_query_length = buffers.longest_query
        inputs.max_context_length = buffers.longest_context
        return inputs

    def write_tokens(self, tokens: Tensor, device: DeviceState) -> None:
        """Sampled tokens, int32 [samples], into the history, each after its span."""
        assert device.tokens is self._of["history"]
        self._calls.isthmus_write_tokens(ctypes.byref(self._buffers), len(tokens), tokens.data_ptr())

    def _views(self, num_tokens: int, num_spans: int, num_samples: int) -> StepInputs:
        of = self._of
        return StepInputs(
            token_ids=of["token_ids"][:num_tokens],
            positions=of["positions"][:num_tokens],
            slots=of["slots"][:num_tokens],
            span_rows=of["span_rows"][:num_spans],
            query_starts=of["query_starts"][: num_spans + 1],
            context_lengths=of["context_lengths"][:num_spans],
            block_tables=of["tables"],
            sample_tokens=of["sample_tokens"][:num_samples],
            sample_rows=of["sample_rows"][:num_samples],
            num_tokens=num_tokens,
            num_spans=num_spans,
            num_samples=num_samples,
            max_query_length=0,
            max_context_length=0,
        )


def address(array: NDArray[Any], dtype: Any = np.int32) -> int:
    assert array.dtype == dtype and array.flags.c_contiguous
    where: int = array.__array_interface__["data"][0]
    return where
