"""From what was seen of each request to the figures of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Seen:
    """One request.  Times are seconds; ``gaps_s`` are between events of the stream after the first."""

    started_s: float
    ttft_s: float = 0.0
    ended_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; ``values`` are sorted."""
    if not values:
        return 0.0
    return values[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))]


def spread(values: Sequence[float], scale: float = 1000.0, digits: int = 3) -> dict[str, float]:
    """Mean and percentiles, in milliseconds unless ``scale`` says otherwise."""
    ordered = sorted(values)
    mean = sum(ordered) / len(ordered) if ordered else 0.0
    found = {"mean": mean, **{f"p{round(share * 100)}": percentile(ordered, share) for share in (0.5, 0.9, 0.99)}}
    found["max"] = ordered[-1] if ordered else 0.0
    return {name: round(value * scale, digits) for name, value in found.items()}


def summarize(seen: Sequence[Seen], wall_s: float) -> dict[str, Any]:
    good = [request for request in seen if not request.error]
    output = sum(request.output_tokens for request in good)
    prompt = sum(request.prompt_tokens for request in good)
    return {
        "requests": len(seen),
        "completed": len(good),
        "errors": dict(Counter(request.error for request in seen if request.error)),
        "wall_s": round(wall_s, 6),
        "request_per_s": round(len(good) / wall_s, 3),
        "output_tokens": output,
        "output_token_per_s": round(output / wall_s, 2),
        "total_token_per_s": round((output + prompt) / wall_s, 2),
        "ttft_ms": spread([request.ttft_s for request in good]),
        "itl_ms": spread([gap for request in good for gap in request.gaps_s]),
        "e2e_ms": spread([request.ended_s - request.started_s for request in good]),
    }
