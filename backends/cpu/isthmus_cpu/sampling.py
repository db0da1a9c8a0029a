"""Sampling with the reference's semantics: masks and penalties are the reference's own, the passes over
the vocabulary compiled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan
from isthmus.reference.adjust import adjust
from isthmus.reference.noise import row_keys
from isthmus.reference.sampling_rows import SamplingState, StepRows
from isthmus.sampling_params import RowSampling
from isthmus_cpu.inputs import PanelInputs
from isthmus_cpu.library import Kind
from isthmus_cpu.runner import Runner


class PanelSampling:
    """:class:`isthmus.contract.Sampling`.  See :class:`isthmus.reference.ReferenceSampling` for what it does."""

    def __init__(self, runner: Runner, inputs: PanelInputs) -> None:
        self._runner = runner
        self._inputs = inputs

    def allocate(self, limits: Limits) -> SamplingState:
        tokens = torch.zeros(limits.max_rows, dtype=torch.int32)
        invalid = torch.zeros(limits.max_rows, dtype=torch.bool)
        # Views of every length, since each step needs one of them.
        self._results = [
            Sampled(tokens=tokens[:count], invalid=invalid[:count]) for count in range(limits.max_rows + 1)
        ]
        self._special = np.zeros(limits.max_rows, np.bool_)
        return SamplingState.neutral(limits)

    def apply(self, state: SamplingState, plan: StepPlan) -> None:
        state.apply(plan)
        for start in plan.starts:
            self._special[start.row] = is_special(start.sampling)

    def sample(
        self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: SamplingState, num_logprobs: int
    ) -> Sampled:
        assert logits.is_contiguous()
        result = self._results[logits.shape[0]]
        tokens, invalid, raw = result.tokens, result.invalid, logits
        if self._special[state.rows].any():
            rows = state.step(inputs.num_samples)
            if is_adjusted(rows):
                raw = logits.clone() if num_logprobs >= 0 else logits
                self._likeliest(logits, tokens, invalid)  # for the rows that are invalid before any mask
                before = invalid.clone()
                adjust(logits, rows, device)
                self._draw(logits, rows, tokens, invalid)
                invalid |= before
                tokens.masked_fill_(invalid, 0)
            else:
                self._draw(logits, rows, tokens, invalid)
        else:
            self._likeliest(logits, tokens, invalid)
        self._inputs.write_tokens(tokens, device)
        if num_logprobs < 0:
            return result
        return self._with_logprobs(raw, tokens, invalid, num_logprobs)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        assert logits.is_contiguous()
        likeliest = torch.empty_like(next_tokens)
        invalid = torch.empty(len(next_tokens), dtype=torch.bool)
        self._likeliest(logits, likeliest, invalid)
        return self._with_logprobs(logits, next_tokens, invalid, num_logprobs)

    def _likeliest(self, logits: Tensor, tokens: Tensor, invalid: Tensor) -> None:
        self._runner.run(Kind.ARGMAX, logits, (logits, tokens, invalid), (logits.shape[1],))

    def _draw(self, logits: Tensor, rows: StepRows, tokens: Tensor, invalid: Tensor) -> None:
        state, names = rows.state, rows.rows
        parameters = (
            rows.temperature,
            state.top_k[names],
            state.top_p[names],
            state.min_p[names],
            row_keys(state.seed[names], rows.positions),
        )
        columns = tuple(torch.from_numpy(values) for values in parameters)
        self._runner.run(Kind.DRAW, logits, (logits, tokens, invalid, *columns), (logits.shape[1],))

    def _with_logprobs(self, raw: Tensor, tokens: Tensor, invalid: Tensor, num_logprobs: int) -> Sampled:
        """Log-softmax of ``raw`` [positions, vocab] at ``tokens``, their ranks, and the likeliest."""
        count, wanted = len(tokens), min(num_logprobs, raw.shape[1])
        chosen, ranks = torch.empty(count), torch.empty(count, dtype=torch.int32)
        top_ids, top_logprobs = torch.empty(count, wanted, dtype=torch.int32), torch.empty(count, wanted)
        self._runner.run(
            Kind.LOGPROBS, raw, (raw, tokens, chosen, ranks, top_ids, top_logprobs), (raw.shape[1], wanted)
        )
        return Sampled(
            tokens=tokens,
            invalid=invalid,
            chosen_logprobs=chosen,
            ranks=ranks,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
        )


def is_special(sampling: RowSampling) -> bool:
    """Whether a row may want another token than the likeliest of the model's own logits."""
    return bool(
        sampling.temperature != 0.0
        or sampling.needs_history
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.min_tokens
    )


def is_adjusted(rows: StepRows) -> bool:
    """Whether a row has a mask, a bias or a penalty."""
    state = rows.state
    return bool(state.bias or state.allowed or state.bad_words or state.stops or len(rows.penalised))
