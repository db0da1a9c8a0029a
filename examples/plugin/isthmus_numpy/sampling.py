"""Logits to tokens, a row at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan
from isthmus.sampling_params import RowSampling

Array = np.ndarray[Any, Any]
GREEDY = RowSampling(max_tokens=1)


@dataclass
class Rows:
    """Parameters by row; rows that never started, the padding row among them, are greedy."""

    sampling: dict[int, RowSampling] = field(default_factory=dict)


class NumpySampling:
    def allocate(self, limits: Limits) -> Rows:
        return Rows()

    def apply(self, state: Rows, plan: StepPlan) -> None:
        state.sampling.update((start.row, start.sampling) for start in plan.starts)

    def sample(
        self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: Rows, num_logprobs: int
    ) -> Sampled:
        raw = logits.numpy()
        rows = inputs.sample_rows.numpy()
        positions = inputs.positions.numpy()[inputs.sample_tokens.numpy()] + 1
        prompts = device.num_prompt_tokens.numpy()
        tokens, invalid = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.bool_)
        for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
            history = device.tokens[row, :position].numpy()
            sampling = state.sampling.get(int(row), GREEDY)
            token = choose(raw[index], history, int(prompts[row]), sampling) if usable(raw[index]) else None
            tokens[index], invalid[index] = token or 0, token is None
        device.tokens.numpy()[rows, positions] = tokens
        if num_logprobs < 0:
            return Sampled(tokens=torch.from_numpy(tokens), invalid=torch.from_numpy(invalid))
        return with_logprobs(raw, tokens, invalid, num_logprobs)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        raw = logits.numpy()
        invalid = np.array([not usable(row) for row in raw], np.bool_)
        return with_logprobs(raw, next_tokens.numpy(), invalid, num_logprobs)


def usable(x: Array) -> bool:
    return bool(np.isfinite(x.max()))  # the largest of numbers with a NaN among them is NaN


def choose(raw: Array, history: Array, num_prompt: int, sampling: RowSampling) -> int | None:
    """A token, or ``None`` where the masks leave none."""
    x = adjusted(raw, history, history[num_prompt:], sampling)
    if not usable(x):
        return None
    if sampling.temperature == 0:
        return int(x.argmax())
    x = cut(x / np.float32(sampling.temperature), sampling)
    # Noise of the row's seed and the position alone, so that a draw has no memory and no neighbours.
    noise = np.random.Generator(np.random.Philox(key=np.array([sampling.seed, len(history)], np.uint64)))
    return int((x + noise.gumbel(size=len(x))).argmax())


def adjusted(raw: Array, history: Array, output: Array, sampling: RowSampling) -> Array:
    """In order: allowed tokens, bias, early stops, bad words, penalties."""
    x = raw.copy()
    if sampling.allowed_token_ids:
        allowed = list(sampling.allowed_token_ids)
        x[:] = -np.inf
        x[allowed] = raw[allowed]
    for token, bias in sampling.logit_bias:
        x[token] += bias
    if len(output) < sampling.min_tokens:
        x[list(sampling.stop_token_ids)] = -np.inf
    for *before, last in filter(None, sampling.bad_word_ids):
        if not before or output[-len(before) :].tolist() == before:
            x[last] = -np.inf
    if sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
        seen = np.unique(history)
        repetition = np.float32(sampling.repetition_penalty)
        x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
        ids, counts = np.unique(output, return_counts=True)
        x[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return x


def cut(x: Array, sampling: RowSampling) -> Array:
    """``x`` with -inf for what ``min_p``, ``top_k`` and ``top_p`` leave out; equal logits stay together."""
    with np.errstate(divide="ignore"):
        x = np.where(x >= x.max() + np.log(np.float32(sampling.min_p)), x, -np.inf)
    if 0 < sampling.top_k < len(x):
        x = np.where(x >= np.partition(x, -sampling.top_k)[-sampling.top_k], x, -np.inf)
    if sampling.top_p < 1:
        descending = np.sort(x)[::-1]
        mass = np.exp(descending - descending[0]).astype(np.float64)
        last = int(((mass.cumsum() - mass) < sampling.top_p * mass.sum()).sum()) - 1
        x = np.where(x >= descending[max(last, 0)], x, -np.inf)
    return x


def with_logprobs(raw: Array, tokens: Array, invalid: Array, count: int) -> Sampled:
    logprobs = raw - raw.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(tokens)), tokens]
    top = np.argsort(-logprobs, axis=-1, kind="stable")[:, :count]
    return Sampled(
        tokens=torch.from_numpy(tokens),
        invalid=torch.from_numpy(invalid),
        chosen_logprobs=torch.from_numpy(chosen),
        ranks=torch.from_numpy((logprobs > chosen[:, None]).sum(-1).astype(np.int32) + 1),
        top_ids=torch.from_numpy(top.astype(np.int32)),
        top_logprobs=torch.from_numpy(np.take_along_axis(logprobs, top, -1)),
    )
