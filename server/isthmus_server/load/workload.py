"""Requests of a measurement, the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``spread`` s draws each length evenly from its middle times 1 - s to 1 + s; 0 is always the middle."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0
    spread: float = 0.0
    shared_prefix_tokens: int = 0
    """Tokens that all prompts begin with, for measuring the prefix cache."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    prompt: tuple[int, ...]
    output_tokens: int


def make_requests(workload: Workload) -> list[LoadRequest]:
    """Random tokens from the middle of the vocabulary: special ones stand at its ends."""
    draw = random.Random(workload.seed)
    low = workload.vocab_size // 8
    high = max(low + 1, workload.vocab_size // 2)

    def length(middle: int) -> int:
        return max(1, round(middle * draw.uniform(1 - workload.spread, 1 + workload.spread)))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(low, high), k=count))

    prefix = tokens(workload.shared_prefix_tokens) if workload.shared_prefix_tokens else ()
    return [
        LoadRequest(prefix + tokens(length(workload.prompt_tokens)), length(workload.output_tokens))
        for _ in range(workload.num_requests)
    ]
