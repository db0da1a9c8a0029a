"""Sampling with the reference's semantics; plain greedy steps take one compiled pass over the logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan
from isthmus.reference import ReferenceSampling
from isthmus.reference.sampling_rows import SamplingState
from isthmus_cpu.library import Kind
from isthmus_cpu.runner import Runner


class PanelSampling:
    """:class:`isthmus.contract.Sampling`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._reference = ReferenceSampling(torch.device("cpu"))
        self._tokens = torch.zeros(0, dtype=torch.int32)
        self._invalid = torch.zeros(0, dtype=torch.bool)

    def allocate(self, limits: Limits) -> SamplingState:
        self._tokens = torch.zeros(limits.max_rows, dtype=torch.int32)
        self._invalid = torch.zeros(limits.max_rows, dtype=torch.bool)
        return self._reference.allocate(limits)

    def apply(self, state: SamplingState, plan: StepPlan) -> None:
        self._reference.apply(state, plan)

    def sample(
        self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: SamplingState, num_logprobs: int
    ) -> Sampled:
        if num_logprobs >= 0 or not state.step(inputs.num_samples).all_plain_greedy:
            return self._reference.sample(logits, inputs, device, state, num_logprobs)
        assert logits.is_contiguous()
        samples = logits.shape[0]
        tokens, invalid = self._tokens[:samples], self._invalid[:samples]
        self._runner.run(Kind.ARGMAX, logits, (logits, tokens, invalid), (logits.shape[1],))
        positions = inputs.positions.numpy()[inputs.sample_tokens.numpy()]
        device.tokens.numpy()[inputs.sample_rows.numpy(), positions + np.int32(1)] = tokens.numpy()
        return Sampled(tokens=tokens, invalid=invalid)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        return self._reference.prompt_logprobs(logits, next_tokens, num_logprobs)
