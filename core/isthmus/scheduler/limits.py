"""What bounds a step and the queue."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.contract.capabilities import SpanMix


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Settings already merged with what the device can do."""

    max_num_seqs: int
    """Rows: sequences that run at once."""
    max_num_batched_tokens: int
    """Tokens a step may compute."""
    max_model_len: int
    """Tokens a sequence may have, prompt and output."""
    max_waiting: int = 4096
    max_overtakes: int = 64
    """How many later requests may start before one that does not fit yet."""
    max_deferrals: int = 64
    """For how many steps a request waits for another to compute the prefix that they share."""
    steps_in_flight: int = 1
    """Steps that may be planned before the first one's result is in."""
    span_mix: SpanMix = SpanMix.ANY
    max_long_spans: int = 0
    """Of spans that may not share a step with those of one token; 0 for no bound."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_waiting", "steps_in_flight"):
            assert getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1"
