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
from dataclasses import asdict, dataclass, replace

import numpy as np
import psutil
import uvloop

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Seconds that one run took: by the wall clock, and of each process's own time."""

    wall_s: float
    client_cpu_s: float = 0.0
    engine_cpu_s: float = 0.0


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def through_process(workload: Workload, runs: int) -> list[Run]:
    """After one run to warm up."""

    async def one(client: AsyncEngineClient, request: AddRequest) -> int:
        tokens = 0
        async for output in client.generate(request):
            tokens += len(output.tokens)
        return tokens

    measured: list[Run] = []
    async with await AsyncEngineClient.start(engine_options(workload), log_level="WARNING") as client:
        own, engine = psutil.Process(), psutil.Process(client.pid)
        for run in range(runs + 1):
            requests = make_requests(workload, run * workload.requests)
            begun, client_cpu_s, engine_cpu_s = time.perf_counter(), cpu_s(own), cpu_s(engine)
            counts = await asyncio.gather(*(one(client, request) for request in requests))
            wall_s = time.perf_counter() - begun
            measured.append(
                Run(wall_s=wall_s, client_cpu_s=cpu_s(own) - client_cpu_s, engine_cpu_s=cpu_s(engine) - engine_cpu_s)
            )
            assert counts == [workload.output_tokens] * workload.requests
    return measured[1:]


def in_process(workload: Workload, runs: int) -> list[Run]:
    engine = LocalEngine.start(engine_options(workload))
    measured: list[Run] = []
    for run in range(runs + 1):
        requests = make_requests(workload, run * workload.requests)
        begun, cpu = time.perf_counter(), time.process_time()
        tokens = sum(len(output.tokens) for output in engine.generate(requests))
        measured.append(Run(wall_s=time.perf_counter() - begun, engine_cpu_s=time.process_time() - cpu))
        assert tokens == workload.requests * workload.output_tokens
    engine.close()
    return measured[1:]


def figures(workload: Workload, measured: list[Run], shorter: list[Run]) -> dict[str, float]:
    """``shorter`` is the same with half the output tokens: the difference is what a further step costs,
    without the requests' coming and going and the steps of their prompts."""
    steps = workload.output_tokens
    further_steps = (steps - steps // 2) * 1e-6
    wall_s = statistics.median(run.wall_s for run in measured)
    # Means, since the system counts a process's time in hundredths of a second.
    client_s, engine_s, shorter_client_s, shorter_engine_s = (
        statistics.mean(getattr(run, name) for run in runs)
        for runs in (measured, shorter)
        for name in ("client_cpu_s", "engine_cpu_s")
    )
    return {
        "seconds": round(wall_s, 4),
        "steps_per_s": round(steps / wall_s, 1),
        "us_per_step": round(wall_s / steps * 1e6, 1),
        "tokens_per_s": round(workload.requests * steps / wall_s),
        "engine_cpu_us_per_step": round(engine_s / steps * 1e6, 1),
        "engine_cpu_us_per_further_step": round((engine_s - shorter_engine_s) / further_steps, 1),
        "client_cpu_us_per_step": round(client_s / steps * 1e6, 1),
        "client_cpu_us_per_further_step": round((client_s - shorter_client_s) / further_steps, 1),
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
    shorter = replace(workload, output_tokens=workload.output_tokens // 2)
    start_loop = asyncio.new_event_loop if plain else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=start_loop) as runner:
        through = [runner.run(through_process(each, runs)) for each in (workload, shorter)]
    local = [in_process(each, runs) for each in (workload, shorter)]
    report = {
        "benchmark": "engine_overhead",
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "loop": "asyncio" if plain else "uvloop",
        "runs": runs,
        "workload": asdict(workload),
        "through_process": figures(workload, *through),
        "in_process": figures(workload, *local),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
