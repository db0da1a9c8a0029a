"""Measurements of the engine in this process, without HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isthmus.sampling_params import SamplingParams
from isthmus_server.load.report import spread
from isthmus_server.load.workload import LoadRequest

if TYPE_CHECKING:
    from isthmus.llm import LLM


def measure_throughput(llm: LLM, requests: Sequence[LoadRequest]) -> dict[str, Any]:
    """All at once; the engine decides what runs when."""
    started = time.perf_counter()
    outputs = _run(llm, requests)
    wall_s = time.perf_counter() - started
    prompt = sum(len(request.prompt) for request in requests)
    return {
        "requests": len(requests),
        "wall_s": round(wall_s, 3),
        "output_tokens": outputs,
        "output_token_per_s": round(outputs / wall_s, 2),
        "total_token_per_s": round((outputs + prompt) / wall_s, 2),
    }


def measure_latency(llm: LLM, requests: Sequence[LoadRequest], batch_size: int) -> dict[str, Any]:
    """Batch after batch, each to its end before the next."""
    walls = []
    for start in range(0, len(requests), batch_size):
        started = time.perf_counter()
        _run(llm, requests[start : start + batch_size])
        walls.append(time.perf_counter() - started)
    return {"batches": len(walls), "batch_size": batch_size, "batch_ms": spread(walls)}


def _run(llm: LLM, requests: Sequence[LoadRequest]) -> int:
    params = [
        SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True) for request in requests
    ]
    found = llm.generate([list(request.prompt) for request in requests], params, use_tqdm=False)
    return sum(len(choice.token_ids) for request in found for choice in request.outputs)
