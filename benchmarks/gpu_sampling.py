"""Sampling over a vocabulary of 128,256 on the card at hand: whole, each kernel alone, and over launch parameters.

    python benchmarks/gpu_sampling.py --out sampling.json [--only check,whole] [--variants rounds=0 overlap=0,rounds=2]

A figure is of one ``TritonSampling.sample`` within a captured graph of several, over random logits of
a fixed seed: the median of the replays, and its least and most over the seeds.  ``check`` compares the
tokens with the reference's.  ``kernels`` lists what the profiler saw of each launch, in order, without
overlap.  ``variants`` changes one parameter at a time; ``best`` names the fastest for each way to sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_kernels import VOCAB, Timed, arch, device, random, timed_us

from isthmus.contract import Limits, StepShape
from isthmus.plan import RowStart, StepPlan
from isthmus.reference.cut import CutRows, draw
from isthmus.reference.noise import row_keys
from isthmus.sampling_params import RowSampling
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.inputs import TritonInputs
from isthmus_triton.launch import SamplingLaunch, launch_table
from isthmus_triton.sampling import RowStates, TritonSampling

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_p 0.5": {"temperature": 1.0, "top_p": 0.5},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_k 50 top_p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
}
SHAPES = ((256, 1.0), (256, 4.0), (32, 1.0), (32, 4.0), (1, 1.0), (1, 4.0))
"""Rows, and the standard deviation of their logits."""
CHANGES = (
    "rounds=0", "rounds=1", "rounds=2", "overlap=0", "block=512", "block=2048", "wide=2048", "wide=4096",
    "wide=8192", "first_programs=528", "first_programs=2112", "first_programs=4096", "round_programs=264",
    "round_programs=1056", "choose_warps=16",
)  # fmt: skip
LIMITS = Limits(max_rows=256, max_tokens=256, max_model_len=1024, block_size=64, num_blocks=8, vocab_size=VOCAB)
HISTORY = 512


@dataclass
class Variant:
    """A sampler of its own launch parameters, and its rows."""

    name: str
    sampling: TritonSampling
    rows: RowStates


def make_variant(change: str, ahead: CompileAhead) -> Variant:
    """Of ``name=number,...``; nothing changed where it is empty.  Its kernels begin to be compiled."""
    changed = {name: int(value) for name, value in (part.split("=") for part in change.split(",") if part)}
    table = launch_table(arch())
    for name, value in changed.items():
        if name in {field.name for field in fields(SamplingLaunch)}:
            table = replace(table, sampling=replace(table.sampling, **{name: value}))
        else:
            table = replace(table, **{name: type(getattr(table, name))(value)})
    sampling = TritonSampling(device(), table, ahead)
    return Variant(change or "committed", sampling, sampling.allocate(LIMITS))


class Step:
    """``count`` rows to sample, all in the same way, each with a seed of its own."""

    def __init__(self, variant: Variant, count: int, parameters: dict[str, Any], seed: int) -> None:
        self.seeds = np.arange(count, dtype=np.int64) + 1000 * seed
        prompt = np.random.default_rng(0).integers(0, VOCAB, HISTORY).astype(np.int32)
        starts = tuple(
            RowStart(
                row=row,
                tokens=prompt,
                num_prompt_tokens=256,
                sampling=RowSampling(max_tokens=9, seed=int(self.seeds[row]), **parameters),
            )
            for row in range(count)
        )
        each = np.ones(count, np.int32)
        plan = StepPlan(
            step=0,
            starts=starts,
            span_rows=np.arange(count, dtype=np.int32),
            span_starts=each * (HISTORY - 1),
            span_lengths=each,
            span_samples=np.ones(count, np.bool_),
        )
        inputs = TritonInputs(device(), CompileAhead(torch.device("cpu")))
        state = inputs.allocate(LIMITS)
        inputs.upload(plan, state)
        variant.sampling.apply(variant.rows, plan)
        built = inputs.build(state, StepShape(count, count, count))
        self.sample = lambda logits: variant.sampling.sample(logits, built, state, variant.rows, -1)


def steps(
    variant: Variant, count: int, spread: float, parameters: dict[str, Any], seed: int
) -> list[Callable[[], Any]]:
    torch.manual_seed(seed)
    step = Step(variant, count, parameters, seed)
    copies = [random(count, VOCAB, dtype=torch.float32, scale=spread) for _ in range(2 if count > 32 else 8)]
    return [lambda x=x: step.sample(x) for x in copies]


def timed(variant: Variant, count: int, spread: float, kind: str, seeds: int) -> dict[str, Any]:
    times = [timed_us(Timed(steps(variant, count, spread, KINDS[kind], seed))) for seed in range(seeds)]
    return {
        "kind": kind,
        "rows": count,
        "spread": spread,
        "variant": variant.name,
        "us": round(statistics.median(times), 2),
        "least_us": round(min(times), 2),
        "most_us": round(max(times), 2),
    }


def check(variant: Variant, kinds: Iterable[str], count: int = 64) -> Iterator[dict[str, Any]]:
    """How many rows' tokens are not the reference's: two sums may round apart at a cut, no more."""
    for spread in (1.0, 4.0):
        for kind in kinds:
            parameters = {**KINDS[kind], "temperature": 0.7} if KINDS[kind] else {}
            torch.manual_seed(7)
            logits = random(count, VOCAB, dtype=torch.float32, scale=spread)
            step = Step(variant, count, parameters, 7)
            ours = step.sample(logits.clone()).tokens.long()
            expected = logits.argmax(-1) if not parameters else reference(logits, parameters, step.seeds)
            wrong = int((ours != expected).sum())
            yield {"kind": kind, "spread": spread, "variant": variant.name, "rows": count, "differ": wrong}


def reference(logits: torch.Tensor, parameters: dict[str, Any], seeds: np.ndarray) -> torch.Tensor:
    count = len(seeds)

    def column(name: str, neutral: float) -> torch.Tensor:
        return torch.full((count,), parameters.get(name, neutral), device=device())

    keys = torch.from_numpy(row_keys(seeds, np.full(count, HISTORY, np.int32))).to(device())
    rows = CutRows(column("top_k", 0).long(), column("top_p", 1.0), column("min_p", 0.0), keys)
    return draw(logits / column("temperature", 1.0)[:, None], rows)


def kernels(variant: Variant, kind: str, count: int, spread: float, replays: int = 5) -> dict[str, Any]:
    """Median microseconds of each launch, in the order of the launches."""
    calls = steps(variant, count, spread, KINDS[kind], 0)[:1]
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls[0]()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    seen = [event for event in profile.events() if event.name.endswith("_kernel")]
    seen.sort(key=lambda event: event.time_range.start)
    each = len(seen) // replays
    assert each and len(seen) == each * replays, f"{len(seen)} kernels in {replays} replays"
    launches = [seen[at::each] for at in range(each)]
    return {
        "kind": kind,
        "rows": count,
        "spread": spread,
        "variant": variant.name,
        "launches": [
            [same[0].name, round(statistics.median(event.time_range.elapsed_us() for event in same), 2)]
            for same in launches
        ],
    }


def best(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest variant of each case."""
    cases = {(record["kind"], record["rows"], record["spread"]) for record in records}
    found = []
    for case in sorted(cases):
        same = [record for record in records if (record["kind"], record["rows"], record["spread"]) == case]
        committed = [record["us"] for record in same if record["variant"] == "committed"]
        fastest = min(same, key=lambda record: record["us"])
        found.append({**fastest, "committed_us": committed[0] if committed else None})
    return found


SWEPT = (
    ("top_p 0.9", 256, 1.0), ("greedy", 256, 1.0), ("top_p 0.5", 256, 1.0), ("temperature", 256, 1.0),
    ("top_k 50", 256, 1.0), ("top_p 0.9", 256, 4.0), ("top_p 0.9", 1, 4.0),
)  # fmt: skip
"""What each variant is timed at."""


def records(part: str, variants: list[Variant], seeds: int) -> Iterator[dict[str, Any]]:
    """Of one part; the first two variants are what is committed, and that without overlap."""
    committed, plain = variants[:2]
    if part == "check":
        for variant in variants:
            yield from check(variant, KINDS if variant in (committed, plain) else ("top_p 0.5", "temperature"))
    elif part == "whole":
        for (count, spread), kind in itertools.product(SHAPES, KINDS):
            yield timed(committed, count, spread, kind, seeds)
    elif part == "variants":
        for (kind, count, spread), variant in itertools.product(SWEPT, variants):
            yield timed(variant, count, spread, kind, 3)
    else:
        assert part == "kernels", f"no part {part}"
        for kind, (count, spread) in itertools.product(KINDS, ((256, 1.0), (1, 4.0))):
            yield kernels(plain, kind, count, spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sampling.json"))
    parser.add_argument("--only", default="check,whole,variants,kernels")
    parser.add_argument("--variants", nargs="*", default=CHANGES, help="changes, each name=number,name=number")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=50.0, help="leave out what is left after this long")
    arguments = parser.parse_args()
    began = time.perf_counter()
    ahead = CompileAhead(device())
    variants = [make_variant(change, ahead) for change in dict.fromkeys(("", "overlap=0", *arguments.variants))]
    ahead.wait()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "compiled_s": round(time.perf_counter() - began, 1),
        "failed": [],
    }
    for part in arguments.only.split(","):
        made = result[part] = []
        try:
            for record in records(part, variants, arguments.seeds):
                made.append(record)
                print(json.dumps({part: record}), flush=True)
                if time.perf_counter() - began > arguments.budget_s:
                    result["failed"].append(f"out of time in {part}")
                    break
        except Exception as error:  # one bad part must not lose the others
            traceback.print_exc(limit=4)
            result["failed"].append(f"{part}: {type(error).__name__}: {error}"[:300])
    result["best"] = best(result.get("variants", []))
    result["seconds"] = round(time.perf_counter() - began, 1)
    arguments.out.write_text(json.dumps(result, indent=0))
    for record in result["best"]:
        print(json.dumps({"best": record}))
    if differing := [record for record in result.get("check", []) if record["differ"]]:
        sys.exit(f"tokens differ from the reference's: {differing}")


if __name__ == "__main__":
    main()
