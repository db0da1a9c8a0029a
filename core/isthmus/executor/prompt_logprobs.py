"""Which positions of a step need log-probabilities of the prompt token that follows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.plan import Int32Array, StepPlan, TokenLogprobs

PIECE: Final = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """Up to :data:`PIECE` positions of one row, by their place in the step's tokens."""

    row: int
    begin: int
    next_tokens: Int32Array  # [positions] what stands after each
    num_logprobs: int


class PromptLogprobs:
    """Remembers the prompts of rows that asked for their log-probabilities."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[Int32Array, int]] = {}

    def start(self, plan: StepPlan) -> None:
        """Take over ``plan.starts``."""
        for start in plan.starts:
            self._prompts.pop(start.row, None)
            if start.sampling.num_prompt_logprobs >= 0:
                prompt = np.array(start.tokens[: start.num_prompt_tokens], np.int32)
                self._prompts[start.row] = prompt, start.sampling.num_prompt_logprobs

    def pieces(self, plan: StepPlan) -> list[PromptPiece]:
        return list(self._pieces(plan)) if self._prompts else []

    def _pieces(self, plan: StepPlan) -> Iterator[PromptPiece]:
        begin = 0
        spans = zip(plan.span_rows.tolist(), plan.span_starts.tolist(), plan.span_lengths.tolist(), strict=True)
        for row, start, length in spans:
            if row in self._prompts:
                prompt, num_logprobs = self._prompts[row]
                following = prompt[start + 1 : start + length + 1]
                for offset in range(0, len(following), PIECE):
                    yield PromptPiece(row, begin + offset, following[offset : offset + PIECE], num_logprobs)
            begin += length


def joined(parts: list[TokenLogprobs]) -> TokenLogprobs:
    """Pieces one after another; all have the same number of likeliest tokens."""
    if len(parts) == 1:
        return parts[0]
    return TokenLogprobs(
        chosen=np.concatenate([part.chosen for part in parts]),
        ranks=np.concatenate([part.ranks for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )
