"""Sampling on a compiled device: a program for greedy rows, one for drawn ones, and the host for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan
from isthmus.reference.noise import row_keys
from isthmus.reference.sampling import ReferenceSampling
from isthmus.reference.sampling_rows import SamplingState, StepRows
from isthmus_static.cut import draw, lowest_best
from isthmus_static.inputs import StaticInputs
from isthmus_static.programs import Programs


@dataclass(slots=True, kw_only=True)
class PackedSampled(Sampled):
    """Tokens and whether they are void in one tensor, for one copy to the host."""

    packed: Tensor  # int32 [2, samples]

    def tensors(self) -> list[Tensor]:
        return [self.packed]

    def unpacked(self, arrays: Sequence[Any]) -> Sequence[Any]:
        tokens, invalid = arrays[0]
        return [tokens, invalid != 0]


class StaticSampling:
    """:class:`isthmus.contract.Sampling`.

    Temperature, ``top_k``, ``top_p`` and ``min_p`` are the device's.  A step with any other parameter,
    or with log-probabilities, brings its logits to the host, where the core's reference samples them.
    """

    def __init__(self, device: torch.device, inputs: StaticInputs, programs: Programs) -> None:
        self._device = device
        self._inputs = inputs
        self._programs = programs
        self._reference = ReferenceSampling(torch.device("cpu"))

    def allocate(self, limits: Limits) -> SamplingState:
        return SamplingState.neutral(limits)

    def apply(self, state: SamplingState, plan: StepPlan) -> None:
        state.apply(plan)
        buffer, rows, count = self._inputs.buffer, state.rows, len(state.rows)
        drawn = state.temperature[rows]
        if drawn.any():
            buffer.write("top_k", state.top_k[rows])
            buffer.write("sample_keys", row_keys(state.seed[rows], state.positions))
            buffer.write_floats("top_p", state.top_p[rows], 1.0)
            buffer.write_floats("min_p", state.min_p[rows])
            buffer.write_floats("temperature", drawn)
        assert count <= self._inputs.limits.max_rows

    def sample(
        self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: SamplingState, num_logprobs: int
    ) -> Sampled:
        rows = state.step(inputs.num_samples)
        if num_logprobs >= 0 or not _device_serves(rows):
            return self._on_host(logits, rows, device, state, num_logprobs)
        buffer, samples = self._inputs.buffer, inputs.num_samples

        def greedy(logits: Tensor, tokens: Tensor, ints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _finish(lowest_best(logits), logits, tokens, self._places(ints, samples))

        def drawn(logits: Tensor, tokens: Tensor, ints: Tensor, floats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            temperature = buffer.take_floats(floats, "temperature", samples)
            hot = temperature > 0.0
            chosen = draw(
                logits / torch.where(hot, temperature, 1.0)[:, None],
                buffer.take(ints, "top_k", samples),
                buffer.take_floats(floats, "top_p", samples),
                buffer.take_floats(floats, "min_p", samples),
                buffer.take(ints, "sample_keys", samples),
            )
            chosen = torch.where(hot, chosen, lowest_best(logits))
            return _finish(chosen, logits, tokens, self._places(ints, samples))

        buffer.flush()
        if rows.temperature.any():
            result = self._programs.run("draw", drawn, logits, device.tokens, buffer.ints, buffer.floats)
        else:
            result = self._programs.run("greedy", greedy, logits, device.tokens, buffer.ints)
        packed, chosen, invalid = result
        if not self._programs.is_ready:
            self._store(chosen, device)  # changes nothing: a first step that samples on the host is not to compile it
        return PackedSampled(tokens=chosen, invalid=invalid, packed=packed)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        return self._reference.prompt_logprobs(logits.cpu(), next_tokens.cpu(), num_logprobs)

    def _places(self, ints: Tensor, samples: int) -> Tensor:
        """int64 [samples]: where in the rows' histories the sampled tokens go."""
        buffer, width = self._inputs.buffer, self._inputs.limits.max_model_len + 1
        rows, positions = (buffer.take(ints, name, samples) for name in ("sample_rows", "sample_positions"))
        return (rows * width + positions).long()

    def _on_host(
        self, logits: Tensor, rows: StepRows, device: DeviceState, state: SamplingState, num_logprobs: int
    ) -> Sampled:
        samples = len(rows.rows)
        history = DeviceState(
            tokens=device.tokens.cpu(),
            block_tables=torch.empty(0, dtype=torch.int32),
            num_prompt_tokens=torch.from_numpy(state.num_prompt_tokens),
        )
        index = torch.arange(samples, dtype=torch.int32)
        inputs = StepInputs(
            token_ids=index,
            positions=torch.from_numpy(rows.positions.astype(np.int32) - 1),
            slots=index,
            span_rows=index,
            query_starts=index,
            context_lengths=index,
            block_tables=history.block_tables,
            sample_tokens=index,
            sample_rows=torch.from_numpy(rows.rows),
            num_tokens=samples,
            num_spans=samples,
            num_samples=samples,
            max_query_length=1,
            max_context_length=1,
        )
        sampled = self._reference.sample(logits.cpu(), inputs, history, state, num_logprobs)

        self._inputs.buffer.flush()
        self._store(sampled.tokens.to(self._device), device)
        return sampled

    def _store(self, chosen: Tensor, device: DeviceState) -> None:
        samples = len(chosen)

        def store(tokens: Tensor, chosen: Tensor, ints: Tensor) -> Tensor:
            tokens.view(-1).index_copy_(0, self._places(ints, samples), chosen)
            return chosen + 0

        self._programs.run("store", store, device.tokens, chosen, self._inputs.buffer.ints)


def _device_serves(rows: StepRows) -> bool:
    """Whether no row has a parameter beyond temperature and cuts."""
    state = rows.state
    tables = (state.bias, state.allowed, state.bad_words)
    names = set(rows.rows.tolist())
    plain = not any(names & table.keys() for table in tables)
    return plain and not len(rows.penalised) and not rows.banned_stops()[0].size


def _finish(chosen: Tensor, logits: Tensor, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store the tokens; packed, tokens int32 and invalid bool."""
    # Counted, because on some devices a row's largest is a number though the row has a NaN, or none but -inf.
    unusable = (logits != logits).sum(dim=-1) + (logits == float("inf")).sum(dim=-1)
    has_none = torch.isfinite(logits).sum(dim=-1) == 0
    invalid = unusable + has_none.int() > 0
    kept = torch.where(invalid, 0, chosen).int()
    tokens.view(-1).index_copy_(0, places, kept)
    return torch.stack((kept, invalid.int())), kept, invalid
