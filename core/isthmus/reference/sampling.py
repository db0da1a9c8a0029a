"""Logits to tokens: the semantics that every backend's sampling is held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan
from isthmus.reference.adjust import adjust
from isthmus.reference.cut import CutRows, draw
from isthmus.reference.noise import row_keys
from isthmus.reference.sampling_rows import SamplingState, StepRows


class ReferenceSampling:
    """:class:`isthmus.contract.Sampling`: exact, and each row by itself.

    In order: log-probabilities of the model's own logits; allowed tokens, logit bias,
    ``min_tokens``, bad words and penalties (:mod:`isthmus.reference.adjust`); the likeliest token
    of a greedy row, lowest id among equals; for others temperature, cuts and a draw
    (:mod:`isthmus.reference.cut`) by noise that depends on the row's seed, the token's position
    and its id alone (:mod:`isthmus.reference.noise`).  So a row's token depends neither on its
    neighbours nor on how its sequence was cut into steps.

    A row whose logits hold a NaN or whose largest is not finite, before or after the masks, is
    invalid and gives token 0.

    Parameters are kept on the host: :meth:`apply` must be called with every plan, before that
    plan's :meth:`sample`, whose ``inputs.sample_rows`` it takes to be the plan's sampled rows and
    padding after them.  Drawing waits for the device where that is apart; greedy does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, limits: Limits) -> SamplingState:
        return SamplingState.neutral(limits)

    def apply(self, state: SamplingState, plan: StepPlan) -> None:
        state.apply(plan)

    def sample(
        self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: SamplingState, num_logprobs: int
    ) -> Sampled:
        rows = state.step(inputs.num_samples)
        if rows.all_plain_greedy:
            largest, chosen = logits.max(dim=-1)
            invalid = ~torch.isfinite(largest)
            raw = logits
        else:
            raw = logits.clone() if num_logprobs >= 0 else logits
            invalid = ~torch.isfinite(logits.amax(dim=-1))
            adjust(logits, rows, device)
            largest, chosen = logits.max(dim=-1)
            invalid |= ~torch.isfinite(largest)
            _draw_random(logits, chosen, rows)
        tokens = chosen.masked_fill_(invalid, 0).int()
        positions = inputs.positions[inputs.sample_tokens] + 1
        device.tokens[inputs.sample_rows, positions] = tokens
        if num_logprobs < 0:
            return Sampled(tokens=tokens, invalid=invalid)
        return _with_logprobs(raw, tokens, invalid, num_logprobs)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        invalid = ~torch.isfinite(logits.amax(dim=-1))
        return _with_logprobs(logits, next_tokens, invalid, num_logprobs)


def _draw_random(logits: Tensor, chosen: Tensor, rows: StepRows) -> None:
    """Put drawn tokens into ``chosen`` [samples] for the rows that are not greedy."""
    index = np.flatnonzero(rows.temperature)
    if not len(index):
        return
    state, names, where = rows.state, rows.rows[index], logits.device

    def column(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(where)

    at = column(index)
    x = (logits if len(index) == logits.shape[0] else logits[at]).div_(column(rows.temperature[index])[:, None])
    parameters = CutRows(
        top_k=column(state.top_k[names]).long(),
        top_p=column(state.top_p[names]),
        min_p=column(state.min_p[names]),
        keys=column(row_keys(state.seed[names], rows.positions[index])),
    )
    chosen[at] = draw(x, parameters)


def _with_logprobs(raw: Tensor, tokens: Tensor, invalid: Tensor, num_logprobs: int) -> Sampled:
    """Log-softmax of ``raw`` [positions, vocab] at ``tokens``, their ranks, and the likeliest."""
    highest = raw.amax(dim=-1, keepdim=True)
    normaliser = highest + torch.exp(raw - highest).sum(dim=-1, keepdim=True).log()
    own = raw.gather(1, tokens.long()[:, None])
    top, ids = torch.topk(raw, min(num_logprobs, raw.shape[1]), dim=-1)
    return Sampled(
        tokens=tokens,
        invalid=invalid,
        chosen_logprobs=(own - normaliser)[:, 0],
        ranks=(raw > own).sum(dim=-1).int() + 1,
        top_ids=ids.int(),
        top_logprobs=top - normaliser,
    )
