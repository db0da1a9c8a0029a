"""What a step costs the host: plan() and update() with every row decoding, over no device at all.

    python benchmarks/scheduler.py [--steps 400] [--repeats 5]

Prints JSON: microseconds a step, median over steps, then median and spread over repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque

import numpy as np

from isthmus.cache import BlockManager
from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.plan import StepPlan, StepResult
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits

CASES = ((64, 128), (128, 128), (256, 128), (256, 4096), (512, 128), (1024, 128))
BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cases = []
    for num_rows, prompt_tokens in CASES:
        runs = [decode(num_rows, prompt_tokens, args.steps, seed) for seed in range(args.repeats)]
        case: dict[str, object] = {"running": num_rows, "prompt_tokens": prompt_tokens}
        for name in ("plan_us", "update_us", "step_us", "step_mean_us"):
            values = [run[name] for run in runs]
            case[name] = {"median": round(float(np.median(values)), 1), "min": min(values), "max": max(values)}
        cases.append(case)
    json.dump(
        {"benchmark": "scheduler", "steps": args.steps, "repeats": args.repeats, "cases": cases}, sys.stdout, indent=1
    )
    sys.stdout.write("\n")


def decode(num_rows: int, prompt_tokens: int, num_steps: int, seed: int) -> dict[str, float]:
    """Fill all rows, two steps in flight, and time the steps in which each of them decodes."""
    rng = np.random.default_rng(seed)
    max_model_len = prompt_tokens + 2048
    limits = SchedulerLimits(
        max_num_seqs=num_rows, max_num_batched_tokens=8192, max_model_len=max_model_len, steps_in_flight=2
    )
    scheduler = Scheduler(limits, BlockManager(num_rows * (max_model_len // BLOCK_SIZE + 1) + 1, BLOCK_SIZE))
    for number in range(num_rows):
        # Lengths differ by up to a block, as they do in life: rows do not all need a block at once.
        prompt = rng.integers(0, 30_000, prompt_tokens + int(rng.integers(BLOCK_SIZE)))
        sampling = RowSampling(max_tokens=2048, stop_token_ids=(1, 2))
        scheduler.add(AddRequest(number, pack_tokens(prompt), sampling))
    flights: deque[StepResult] = deque()
    plan_s, update_s = [], []
    while len(plan_s) < num_steps:
        began = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        if plan is not None:
            flights.append(result_of(plan, rng))
        if len(flights) == 2 or plan is None:
            result = flights.popleft()
            received = time.perf_counter()
            scheduler.update(result)
            updated = time.perf_counter()
            if plan is not None and plan.num_tokens == num_rows == len(result.rows):
                plan_s.append(planned - began)
                update_s.append(updated - received)
    step_us = (np.array(plan_s) + np.array(update_s)) * 1e6
    return {
        "plan_us": round(float(np.median(plan_s)) * 1e6, 1),
        "update_us": round(float(np.median(update_s)) * 1e6, 1),
        "step_us": round(float(np.median(step_us)), 1),
        "step_mean_us": round(float(step_us.mean()), 1),
    }


def result_of(plan: StepPlan, rng: np.random.Generator) -> StepResult:
    rows = plan.span_rows[plan.span_samples]
    tokens = rng.integers(3, 30_000, (len(rows), 1)).astype(np.int32)
    return StepResult(step=plan.step, rows=rows, tokens=tokens, invalid=np.zeros(len(rows), np.bool_))


if __name__ == "__main__":
    main()
