"""Logits to tokens: the reference semantics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.contract import DeviceState, Limits, Sampled, StepInputs
from isthmus.plan import StepPlan


class ReferenceSampling:
    """:class:`isthmus.contract.Sampling`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, limits: Limits) -> Any:
        return None

    def apply(self, state: Any, plan: StepPlan) -> None:
        pass

    def sample(self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: Any, num_logprobs: int) -> Sampled:
        tokens = logits.argmax(-1).int()
        positions = inputs.positions[inputs.sample_tokens] + 1
        device.tokens[inputs.sample_rows, positions] = tokens
        return Sampled(tokens=tokens, invalid=torch.isnan(logits).any(-1))

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        raise NotImplementedError
