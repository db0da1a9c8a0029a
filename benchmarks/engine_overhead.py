"""What the engine costs a step when the device costs next to nothing.

256 requests of 128 tokens each run at once on the null backend, through the engine process and its
asyncio client, and then in one process without sockets.  Run: ``python benchmarks/engine_overhead.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np

from isthmus.config import BackendOptions, EngineOptions, ModelOptions
from isthmus.engine.client import AsyncEngineClient
from isthmus.engine.local import LocalEngine
from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.sampling_params import RowSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    requests: int = 256
    prompt_tokens: int = 128
    output_tokens: int = 128
    step_s: float = 0.0
    seed: int = 0


def engine_options(workload: Workload) -> EngineOptions:
    return EngineOptions(
        model=ModelOptions(model="toy"),
        backend=BackendOptions(device="null", options={"step_s": str(workload.step_s), "max_rows": "256"}),
    )


def make_requests(workload: Workload, first_id: int) -> list[AddRequest]:
    random = np.random.default_rng(workload.seed + first_id)
    prompts = random.integers(0, 256, (workload.requests, workload.prompt_tokens), dtype=np.int32)
    sampling = RowSampling(max_tokens=workload.output_tokens)
    return [
        AddRequest(request_id=first_id + place, prompt=pack_tokens(prompt), sampling=sampling)
        for place, prompt in enumerate(prompts)
    ]


async def through_process(workload: Workload, runs: int) -> list[float]:
    """Seconds that each run took, by the wall clock, after one run to warm up."""

    async def one(client: AsyncEngineClient, request: AddRequest) -> int:
        tokens = 0
        async for output in client.generate(request):
            tokens += len(output.tokens)
        return tokens

    seconds: list[float] = []
    async with await AsyncEngineClient.start(engine_options(workload), log_level="WARNING") as client:
        for run in range(runs + 1):
            requests = make_requests(workload, run * workload.requests)
            begun = time.perf_counter()
            counts = await asyncio.gather(*(one(client, request) for request in requests))
            seconds.append(time.perf_counter() - begun)
            assert counts == [workload.output_tokens] * workload.requests
    return seconds[1:]


def in_process(workload: Workload, runs: int) -> list[float]:
    engine = LocalEngine.start(engine_options(workload))
    seconds: list[float] = []
    for run in range(runs + 1):
        requests = make_requests(workload, run * workload.requests)
        begun = time.perf_counter()
        tokens = sum(len(output.tokens) for output in engine.generate(requests))
        seconds.append(time.perf_counter() - begun)
        assert tokens == workload.requests * workload.output_tokens
    engine.close()
    return seconds[1:]


def figures(workload: Workload, seconds: list[float]) -> dict[str, float]:
    # Decode steps; the few steps of the prompts are in the time and not in the count.
    median = statistics.median(seconds)
    return {
        "seconds": round(median, 4),
        "steps_per_s": round(workload.output_tokens / median, 1),
        "us_per_step": round(median / workload.output_tokens * 1e6, 1),
        "tokens_per_s": round(workload.requests * workload.output_tokens / median),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Workload()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--asyncio", action="store_true", help="the standard event loop in place of uvloop")
    arguments = vars(parser.parse_args())
    runs, plain = arguments.pop("runs"), arguments.pop("asyncio")
    workload = Workload(**arguments)
    if plain:
        seconds = asyncio.run(through_process(workload, runs))
    else:
        import uvloop

        seconds = uvloop.run(through_process(workload, runs))
    report = {
        "benchmark": "engine_overhead",
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "loop": "asyncio" if plain else "uvloop",
        "runs": runs,
        "workload": asdict(workload),
        "through_process": figures(workload, seconds),
        "in_process": figures(workload, in_process(workload, runs)),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
