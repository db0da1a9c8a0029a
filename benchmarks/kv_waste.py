"""How much of the KV memory that running requests hold has no token in it.

    python benchmarks/kv_waste.py [--requests 1000] [--repeats 3]

ShareGPT-like lengths, lognormal and of fixed seed (prompts of mean 202, outputs of mean 188, at most
1,024 each), go through the scheduler over a device that only makes up tokens.  Prints JSON: the share
of held slots without a token, averaged over steps and weighted by the slots held, with its spread over
repeats of other seeds; and how often requests were preempted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque

import numpy as np

from isthmus.cache import BlockManager
from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.plan import StepResult
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZES = (16, 32)
NUM_TOKENS = 64 * 1024
LONGEST = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cases = []
    for block_size in BLOCK_SIZES:
        runs = [serve(args.requests, block_size, seed) for seed in range(args.repeats)]
        waste = [run["waste"] for run in runs]
        cases.append(
            {
                "block_size": block_size,
                "waste_percent": {"median": round(float(np.median(waste)), 2), "min": min(waste), "max": max(waste)},
                "preemptions": [int(run["preemptions"]) for run in runs],
                "blocks_used_percent": [run["used"] for run in runs],
            }
        )
    json.dump({"benchmark": "kv_waste", "requests": args.requests, "cases": cases}, sys.stdout, indent=1)
    sys.stdout.write("\n")


def lengths(rng: np.random.Generator, mean: float, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Lognormal with sigma 1, cut at 1 and :data:`LONGEST`; ``mean`` is that before the cut."""
    drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(drawn, 1, LONGEST).astype(np.int64)


def serve(num_requests: int, block_size: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    limits = SchedulerLimits(
        max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=2 * LONGEST + 1, steps_in_flight=2
    )
    blocks = BlockManager(NUM_TOKENS // block_size + 1, block_size)
    scheduler = Scheduler(limits, blocks)
    for number, (prompt, output) in enumerate(
        zip(lengths(rng, 202, num_requests), lengths(rng, 188, num_requests), strict=True)
    ):
        tokens = pack_tokens(rng.integers(0, 30_000, prompt))
        scheduler.add(AddRequest(number, tokens, RowSampling(max_tokens=int(output))))
    flights: deque[StepResult] = deque()
    wasted = held = 0.0
    used = []
    while scheduler.has_work:
        while (plan := scheduler.plan()) is not None:
            rows = plan.span_rows[plan.span_samples]
            sampled = rng.integers(0, 30_000, (len(rows), 1)).astype(np.int32)
            flights.append(StepResult(step=plan.step, rows=rows, tokens=sampled, invalid=np.zeros(len(rows), np.bool_)))
            slots = blocks.num_used * block_size
            wasted += scheduler.stats().kv_waste * slots
            held += slots
            used.append(blocks.num_used / blocks.num_usable)
        scheduler.update(flights.popleft())
    return {
        "waste": round(100 * wasted / held, 3),
        "preemptions": scheduler.stats().preemptions,
        "used": round(100 * float(np.mean(used)), 1),
    }


if __name__ == "__main__":
    main()
