"""The CPU backend's kernels beside torch's and beside what the machine allows, on SmolLM2-135M's shapes.

    python benchmarks/cpu_kernels.py --json benchmarks/results/cpu_kernels.json

Measures read bandwidth, products over all of the model's linears (against ``F.linear`` and oneDNN's
packed product), attention, and whole steps of the model, through the executor, with random weights.
Implementations take turns within each repeat, since a shared machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from isthmus.cache import BlockManager
from isthmus.config import BackendOptions, EngineOptions, ModelOptions
from isthmus.contract import AttentionSpec
from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.executor import build_executor
from isthmus.model.source import ModelSource
from isthmus.model.spec import LayerSpec, ModelSpec, RopeSpec
from isthmus.plugins import select_backend
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits
from isthmus_cpu.library import Kind
from isthmus_cpu.machine import processor_name, usable_cores
from isthmus_cpu.pages import large_pages
from isthmus_cpu.plain import PACK_ROWS, onednn_packs
from isthmus_cpu.selftest import Rig, attention_inputs, random

ATTENTION = AttentionSpec(heads=9, kv_heads=3, head_dim=64, scale=0.125)
SMOLLM2 = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden=576,
    inner=1536,
    layers=(LayerSpec(attention=ATTENTION),) * 30,
    ropes=(RopeSpec(theta=100000.0, rotary_dim=64),),
    max_position=2048,
    norm_epsilon=1e-5,
    tied_embeddings=True,
    dtype="bfloat16",
)
LINEARS = ((960, 576), (576, 576), (3072, 576), (576, 1536))
ROWS = (1, 8, 32, 256)


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    rig = Rig.open(usable_cores())
    try:
        bandwidth = read_bandwidth(rig, args.repeats)
        result = {
            "machine": machine(rig),
            "repeats": args.repeats,
            "read_bandwidth_gb_s": bandwidth,
            "linears_ms": {str(rows): linears(rig, rows, args) for rows in ROWS},
            "attention_ms": {
                f"{spans} spans of {length} over {context}": attention(rig, spans, length, context, args.repeats)
                for spans, length, context in ((1, 1, 192), (8, 1, 192), (32, 1, 192), (1, 1, 2000), (2, 128, 128))
            },
        }
    finally:
        rig.close()
    result["step_ms"] = whole_steps(args.repeats)
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=30, help="layers of weights that a pass goes through")
    parser.add_argument("--json")
    return parser.parse_args()


def machine(rig: Rig) -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "instructions": rig.library.instructions,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:
                taken[name].append((time.perf_counter() - began) * 1e3)
    return taken


def spread(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [25, 75])
    return {
        "least": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "quartiles": round(high - low, 3),
    }


def read_bandwidth(rig: Rig, repeats: int, megabytes: int = 512) -> dict[str, float]:
    memory = large_pages(megabytes << 20)
    memory.fill_(1)
    taken = in_turns({"": lambda: rig.runner.run(Kind.READ, memory, (memory,), (memory.numel(),), rows=1)}, repeats)[""]
    return spread([memory.numel() / ms / 1e6 for ms in taken]) | {"best": round(memory.numel() / min(taken) / 1e6, 1)}


def linears(rig: Rig, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """One pass over the fused linears of all layers."""
    weights = [random(*shape).bfloat16() for _ in range(args.layers) for shape in LINEARS]
    inputs = {depth: random(rows, depth) for depth in (576, 1536)}
    packed = [rig.ops.prepare_linear(weight) for weight in weights]
    calls: dict[str, Callable[[], object]] = {
        "isthmus bfloat16": lambda: [rig.ops.linear(inputs[w.in_features], w) for w in packed]
    }
    for dtype in (torch.bfloat16, torch.float32):
        x = {depth: value.to(dtype) for depth, value in inputs.items()}
        theirs = [weight.to(dtype) for weight in weights]
        name = str(dtype).removeprefix("torch.")
        calls[f"torch {name}"] = lambda x=x, theirs=theirs: [F.linear(x[w.shape[1]], w) for w in theirs]  # type: ignore[misc]
        if onednn_packs(dtype):
            calls[f"oneDNN packed {name}"] = one_dnn(x, theirs)
    figures: dict[str, Any] = {name: spread(taken) for name, taken in in_turns(calls, args.repeats).items()}
    size = sum(weight.numel() for weight in weights)
    least = figures["isthmus bfloat16"]["least"]
    return figures | {
        "isthmus_gb_s": round(2 * size / least / 1e6, 1),
        "isthmus_gflop_s": round(2 * size * rows / least / 1e6, 1),
    }


def one_dnn(x: dict[int, torch.Tensor], weights: list[torch.Tensor]) -> Callable[[], object]:
    ops = torch.ops.mkldnn
    packed = [(weight.shape[1], ops._reorder_linear_weight(weight, PACK_ROWS)) for weight in weights]
    return lambda: [ops._linear_pointwise(x[depth], weight, None, "none", [], "") for depth, weight in packed]


def attention(rig: Rig, spans: int, length: int, context: int, repeats: int) -> dict[str, Any]:
    """Thirty layers' worth, each over its own cache."""
    limits, inputs = attention_inputs(spans, length, context)
    caches = rig.attention.allocate([ATTENTION] * 30, limits, "bfloat16")
    for cache in caches:  # as resident as a cache in use
        cache.keys.fill_(0)
        cache.values.fill_(0)
    query = random(inputs.num_tokens, ATTENTION.heads, ATTENTION.head_dim)
    plan = rig.attention.plan(inputs)
    taken = in_turns(
        {"": lambda: [rig.attention.attend(query, cache, ATTENTION, plan, inputs) for cache in caches]}, repeats
    )[""]
    seen = spans * length * (context - (length - 1) / 2) * 30
    return spread(taken) | {
        "gflop_s": round(4 * seen * 9 * 64 / min(taken) / 1e6, 1),
        "gb_s": round(spans * context * 3 * 64 * 4 * 30 / min(taken) / 1e6, 1),
    }


def whole_steps(repeats: int) -> dict[str, Any]:
    """A step through scheduler, executor and backend: decode of 1, 8 and 32 rows, prefill of 256 tokens."""
    backend = select_backend("cpu").open({"kernels": "require"})
    try:
        options = EngineOptions(
            model=ModelOptions(model="smollm2", max_model_len=512, random_weights=True),
            backend=BackendOptions(device="cpu"),
        )
        source = ModelSource(name="smollm2", path=Path("smollm2"), kind="safetensors")
        executor, report = build_executor(options, backend, source, SMOLLM2, False)
        limits = executor.limits
        figures: dict[str, Any] = {"dtype": report.dtype}
        for rows in (1, 8, 32):
            figures[f"decode {rows}"] = spread(decode_steps(executor, rows, repeats))
        figures["prefill 256"] = spread([prefill_step(executor, 256, seed) for seed in range(repeats)])
        assert limits.max_tokens >= 256
        executor.close()
    finally:
        backend.close()
    return figures


def scheduler_of(executor: Any) -> Scheduler:
    limits = executor.limits
    return Scheduler(
        SchedulerLimits(
            max_num_seqs=limits.max_rows,
            max_num_batched_tokens=limits.max_tokens,
            max_model_len=limits.max_model_len,
        ),
        BlockManager(limits.num_blocks, limits.block_size, prefix_caching=False),
    )


def request(number: int, length: int, max_tokens: int) -> AddRequest:
    prompt = np.random.default_rng(number).integers(0, SMOLLM2.vocab_size, length, dtype=np.int32)
    return AddRequest(request_id=number, prompt=pack_tokens(prompt), sampling=RowSampling(max_tokens=max_tokens))


def decode_steps(executor: Any, rows: int, repeats: int) -> list[float]:
    """Milliseconds of steps in which every row has 192 tokens behind it."""
    scheduler = scheduler_of(executor)
    for number in range(rows):
        scheduler.add(request(number, 192, repeats + 40))
    taken: list[float] = []
    while len(taken) < repeats:
        plan = scheduler.plan()
        assert plan is not None
        began = time.perf_counter()
        executor.submit(plan)
        result = executor.collect()
        if plan.num_tokens == plan.num_spans == rows:
            taken.append((time.perf_counter() - began) * 1e3)
        scheduler.update(result)
    return taken


def prefill_step(executor: Any, tokens: int, seed: int) -> float:
    scheduler = scheduler_of(executor)
    scheduler.add(request(seed, tokens, 1))
    plan = scheduler.plan()
    assert plan is not None and plan.num_tokens == tokens
    began = time.perf_counter()
    executor.submit(plan)
    executor.collect()
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    sys.exit(main())
