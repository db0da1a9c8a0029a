"""Kernels alone against the ceilings of the card they run on, over launch parameters.

    python benchmarks/gpu_kernels.py --out kernels.json [--only decode,prefill] [--best]

Every case is timed as a captured graph over enough different buffers to leave the cache, on random
data of a fixed seed; the figure is the median of the replays.  ``--best`` times the committed launch
table alone.  With ``--compile-shard I/N`` every N-th variant is compiled and nothing is timed, so that
several processes can fill Triton's cache first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.contract import AttentionSpec, Limits, RotarySpec, StepInputs, StepShape
from isthmus.plan import StepPlan
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import TritonAttention
from isthmus_triton.inputs import TritonInputs
from isthmus_triton.kernels.elementwise import gated_activation
from isthmus_triton.kernels.linear import LinearScratch, split_linear, vector_linear
from isthmus_triton.kernels.norm import add_rms_norm
from isthmus_triton.launch import (
    DecodeLaunch,
    LaunchTable,
    PrefillLaunch,
    SplitLinear,
    VectorLinear,
    launch_table,
)

LAYER = AttentionSpec(heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)
WEIGHTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
VOCAB = 128256
CACHE_BYTES = 256 * 2**20
"""More than any cache: buffers are rotated until this much has been touched."""


@dataclass
class Timed:
    """``calls`` are made one after another in one graph; ``bytes`` and ``flops`` are of one call."""

    calls: list[Callable[[], Any]]
    bytes: float = 0.0
    flops: float = 0.0


@dataclass
class Case:
    group: str
    name: str
    parameters: dict[str, Any]
    make: Callable[[bool], Timed]  # True: as small as may be, to compile
    variant: str
    """Cases of one variant need one compilation."""


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=device(), dtype=dtype)).mul_(scale)


def times_us(call: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds of the device from before each call to after it, ascending."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)


def timed_us(work: Timed, replays: int = 9) -> float:
    """Median microseconds of one call."""
    for call in work.calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in work.calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return statistics.median(times_us(graph.replay, replays)) / len(work.calls)


def ceilings() -> Iterator[Case]:
    def copy(small: bool) -> Timed:
        x, y = (torch.empty(2**20 if small else 2**31, dtype=torch.uint8, device=device()) for _ in range(2))
        return Timed([lambda: y.copy_(x)] * 8, bytes=2.0 * x.numel())

    def matmul(small: bool) -> Timed:
        n = 256 if small else 8192
        a, b = random(n, n), random(n, n)
        return Timed([lambda: a @ b] * 8, flops=2.0 * n**3)

    yield Case("ceiling", "copy 2 GiB", {}, copy, "-")
    yield Case("ceiling", "bf16 matmul 8192", {}, matmul, "-")


class AttentionBench:
    """Spans of equal (start, length) over ``layers`` caches."""

    def __init__(
        self,
        table: LaunchTable,
        block_size: int,
        batch: int,
        start: int,
        length: int,
        layers: int,
        kv_dtype: str = "bfloat16",
    ) -> None:
        context = start + length
        blocks = -(-context // block_size)
        limits = Limits(
            max_rows=max(batch, 16),
            max_tokens=batch * length,
            max_model_len=context + block_size,
            block_size=block_size,
            num_blocks=batch * blocks + 1,
            vocab_size=VOCAB,
        )
        units = torch.cuda.get_device_properties(0).multi_processor_count
        # Nothing is compiled ahead: a sweep's shards compile what they time.
        ahead = CompileAhead(torch.device("cpu"))
        self.attention = TritonAttention(device(), table, units, eight_bit_cache=True, ahead=ahead)
        inputs = TritonInputs(device(), ahead)
        state = inputs.allocate(limits)
        self.caches = self.attention.allocate([LAYER] * layers, limits, kv_dtype)
        for cache in self.caches:
            cache.keys.copy_(random(*cache.keys.shape))
            cache.values.copy_(random(*cache.values.shape))
        order = np.random.default_rng(0).permutation(np.arange(1, limits.num_blocks, dtype=np.int32))
        rows = np.arange(batch, dtype=np.int32)
        inputs.upload(
            StepPlan(
                step=0,
                block_rows=np.repeat(rows, blocks),
                block_indices=np.tile(np.arange(blocks, dtype=np.int32), batch),
                block_ids=order[: batch * blocks],
                span_rows=rows,
                span_starts=np.full(batch, start, np.int32),
                span_lengths=np.full(batch, length, np.int32),
                span_samples=np.ones(batch, np.bool_),
            ),
            state,
        )
        self.inputs: StepInputs = inputs.build(state, StepShape(batch * length, batch, batch))
        self.plan = self.attention.plan(self.inputs)
        self.query = random(batch * length, LAYER.heads, LAYER.head_dim)

    def calls(self) -> list[Callable[[], Any]]:
        return [
            lambda cache=cache: self.attention.attend(self.query, cache, LAYER, self.plan, self.inputs)
            for cache in self.caches
        ]


DECODE_SHAPES = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024), (1, 32768), (8, 16384), (32, 4096)]


def decode_cases(best: bool) -> Iterator[Case]:
    table = launch_table(arch())
    if best:
        settings = [(table.decode_for(256), block_size) for block_size in (64, 16)]
    else:
        settings = [
            (DecodeLaunch(key_tile=tile, stages=stages, warps=warps, programs_per_unit=units, least_tiles=least), size)
            for tile, stages, warps, size in (
                (64, 3, 4, 64), (64, 2, 4, 64), (64, 4, 4, 64), (64, 3, 8, 64), (32, 4, 4, 64), (32, 3, 4, 64),
                (32, 4, 2, 64), (128, 3, 4, 128), (128, 3, 8, 128), (64, 3, 4, 16), (32, 4, 4, 16), (128, 3, 8, 64),
            )
            for units in (2, 3, 4)
            for least in ((1, 2) if units == 3 and (tile, stages, warps, size) == (64, 3, 4, 64) else (1,))
        ]  # fmt: skip
    for launch, block_size in settings:
        for batch, context in DECODE_SHAPES:

            def make(
                small: bool,
                launch: DecodeLaunch = launch,
                size: int = block_size,
                batch: int = batch,
                context: int = context,
            ) -> Timed:
                layers = 1 if small else max(2, min(32, CACHE_BYTES * 2 // (batch * context * 4096)))
                bench = AttentionBench(
                    replace(table, decode=((256, launch),)),
                    size,
                    1 if small else batch,
                    (64 if small else context) - 1,
                    1,
                    layers,
                )
                return Timed(bench.calls(), bytes=4096.0 * batch * context)

            parameters = {"batch": batch, "context": context, "block": block_size, **_fields(launch)}
            variant = f"decode {block_size} {launch.key_tile} {launch.stages} {launch.warps}"
            yield Case("decode", f"{batch}x{context}", parameters, make, variant)


def prefill_cases(best: bool) -> Iterator[Case]:
    table = launch_table(arch())
    if best:
        settings = [(table.prefill_for(256), block_size) for block_size in (64, 16)]
    else:
        settings = [
            (PrefillLaunch(query_tile=rows, key_tile=tile, stages=stages, warps=warps), size)
            for rows, tile, stages, warps, size in (
                (128, 64, 3, 8, 64), (128, 64, 2, 8, 64), (128, 64, 4, 8, 64), (128, 64, 3, 4, 64), (128, 64, 2, 4, 64),
                (128, 32, 4, 8, 64), (128, 32, 4, 4, 64), (64, 64, 3, 4, 64), (128, 128, 2, 8, 128),
                (128, 128, 3, 8, 128), (128, 128, 2, 8, 64), (256, 64, 3, 8, 64), (128, 64, 3, 8, 16),
                (128, 64, 3, 8, 128),
            )
        ]  # fmt: skip
    for launch, block_size in settings:
        for span in ((1, 0, 8192), (8, 0, 1024), (1, 8192, 8192), (32, 0, 202)):
            batch, start, length = span

            def make(
                small: bool,
                launch: PrefillLaunch = launch,
                size: int = block_size,
                shape: tuple[int, int, int] = span,
            ) -> Timed:
                batch, start, length = (1, 0, 300) if small else shape
                taken = replace(table, prefill=((256, launch),))
                bench = AttentionBench(taken, size, batch, start, length, 1 if small else 3)
                pairs = batch * sum(range(start + 1, start + length + 1))
                return Timed(bench.calls(), flops=4.0 * LAYER.heads * LAYER.head_dim * pairs)

            parameters = {"batch": batch, "start": start, "length": length, "block": block_size, **_fields(launch)}
            variant = f"prefill {block_size} {launch}"
            yield Case("prefill", f"{batch}x({start}+{length})", parameters, make, variant)


def weight_copies(shape: tuple[int, int], small: bool) -> list[torch.Tensor]:
    count = 1 if small else max(2, CACHE_BYTES // (2 * shape[0] * shape[1]) + 1)
    return [random(*shape, scale=0.02) for _ in range(count)]


def product_case(
    group: str, name: str, rows: int, parameters: dict[str, Any], product: Callable[..., Any], variant: str
) -> Case:
    def make(small: bool) -> Timed:
        out_features, in_features = WEIGHTS[name]
        x = random(rows, in_features)
        calls = [lambda w=w: product(x, w) for w in weight_copies((out_features, in_features), small)]
        return Timed(calls, bytes=2.0 * out_features * in_features, flops=2.0 * rows * out_features * in_features)

    return Case(group, name, {"rows": rows, **parameters}, make, variant)


def linear_cases(best: bool) -> Iterator[Case]:
    scratch = LinearScratch(device())
    table = launch_table(arch())
    for name, (out_features, in_features) in WEIGHTS.items():
        for rows in (1, 2, 4, 8, 16, 32, 64, 128):
            yield product_case("linear", name, rows, {"by": "library"}, torch.nn.functional.linear, "-")
            launch = table.linear_for(rows, out_features, in_features)
            if best and launch is not None:
                yield _launched(name, rows, launch, scratch)
        if not best:
            yield from vector_sweep(name, scratch)
            yield from split_sweep(name, scratch)


def vector_sweep(name: str, scratch: LinearScratch) -> Iterator[Case]:
    for out_tile, in_tile, warps in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024, 2048), (1, 2, 4, 8)):
        each = out_tile * in_tile // (32 * warps)
        if 16 <= each <= 128 and WEIGHTS[name][1] % in_tile == 0:
            yield _launched(name, 1, VectorLinear(out_tile=out_tile, in_tile=in_tile, warps=warps), scratch)


def split_sweep(name: str, scratch: LinearScratch) -> Iterator[Case]:
    tiles = ((64, 128, 4, 4), (64, 256, 3, 4), (128, 128, 3, 4), (128, 64, 5, 4), (64, 64, 6, 4), (128, 128, 3, 8))
    for rows, (out_tile, in_tile, stages, warps), splits in itertools.product((8, 32, 64), tiles, (1, 2, 4, 8)):
        programs = -(-WEIGHTS[name][0] // out_tile) * splits
        if 100 <= programs <= 1200 or (splits == 1 and programs > 1200):
            split = SplitLinear(out_tile=out_tile, in_tile=in_tile, splits=splits, stages=stages, warps=warps)
            yield _launched(name, rows, split, scratch)


def _launched(name: str, rows: int, launch: VectorLinear | SplitLinear, scratch: LinearScratch) -> Case:
    if isinstance(launch, VectorLinear):
        return product_case(
            "linear",
            name,
            rows,
            {"by": "vector", **_fields(launch)},
            lambda x, w: vector_linear(x, w, None, launch),
            str(launch),
        )
    variant = f"{launch} {max(16, rows)}"
    return product_case(
        "linear",
        name,
        rows,
        {"by": "split", **_fields(launch)},
        lambda x, w: split_linear(x, w, None, launch, scratch),
        variant,
    )


def fused_cases(best: bool) -> Iterator[Case]:
    for tokens in (1, 32, 256, 8192):

        def norm(small: bool, tokens: int = tokens) -> Timed:
            weight = torch.ones(4096, device=device())
            pairs = [(random(tokens, 4096), random(tokens, 4096)) for _ in range(8)]
            return Timed([lambda p=p: add_rms_norm(*p, weight, 1e-5) for p in pairs], bytes=4 * 2 * 4096.0 * tokens)

        def act(small: bool, tokens: int = tokens) -> Timed:
            xs = [random(tokens, 28672) for _ in range(4)]
            return Timed([lambda x=x: gated_activation(x, "silu") for x in xs], bytes=3 * 2 * 14336.0 * tokens)

        def rotate(small: bool, tokens: int = tokens) -> Timed:
            bench = AttentionBench(launch_table(arch()), 64, 1, 0, tokens, 4)
            rotary = RotarySpec(cos_sin=torch.rand(16384, 128, device=device()), rotary_dim=128)
            qkv = random(tokens, 48 * 128)
            calls = [
                lambda c=c: bench.attention.rotate_and_store(qkv, c, LAYER, rotary, None, bench.inputs)
                for c in bench.caches
            ]
            return Timed(calls, bytes=2 * 2 * 48 * 128.0 * tokens)

        def plan(small: bool, tokens: int = tokens) -> Timed:
            bench = AttentionBench(launch_table(arch()), 64, min(tokens, 256), 1023, 1, 1)
            return Timed([lambda: bench.attention.plan(bench.inputs)] * 4)

        for name, make in (("add norm", norm), ("silu", act), ("rotate", rotate), ("plan", plan)):
            yield Case("fused", name, {"tokens": tokens}, make, f"{name} {tokens}")


GROUPS = {
    "ceiling": lambda best: ceilings(),
    "decode": decode_cases,
    "prefill": prefill_cases,
    "linear": linear_cases,
    "fused": fused_cases,
}


def _fields(launch: Any) -> dict[str, int]:
    return {name: getattr(launch, name) for name in launch.__dataclass_fields__}


def run(case: Case) -> dict[str, Any]:
    record: dict[str, Any] = {"group": case.group, "name": case.name, **case.parameters}
    try:
        work = case.make(False)
        us = timed_us(work)
    except Exception as error:  # one bad variant must not end the sweep
        record["error"] = f"{type(error).__name__}: {error}"[:300]
        if not isinstance(error, torch.OutOfMemoryError):
            print(f"{case.group} {case.name} {case.parameters}: {record['error']}", file=sys.stderr, flush=True)
        return record
    record["us"] = round(us, 2)
    if work.bytes:
        record["tb_s"] = round(work.bytes / us / 1e6, 3)
    if work.flops:
        record["tflop_s"] = round(work.flops / us / 1e6, 1)
    return record


def compile_shard(cases: list[Case], shard: int, of: int) -> None:
    variants = sorted({case.variant for case in cases})
    mine = set(variants[shard::of])
    for case in cases:
        if case.variant in mine and case.variant != "-":
            mine.discard(case.variant)
            try:
                for call in case.make(True).calls[:1]:
                    call()
                torch.cuda.synchronize()
            except Exception:
                traceback.print_exc(limit=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--budget-s", type=float, default=1e9, help="leave out what is left after this long")
    parser.add_argument("--compile-shard", default="")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = [case for group in arguments.only.split(",") for case in GROUPS[group](arguments.best)]
    if arguments.compile_shard:
        shard, of = map(int, arguments.compile_shard.split("/"))
        compile_shard(cases, shard, of)
        return
    began = time.perf_counter()
    records = []
    for case in cases:
        if time.perf_counter() - began > arguments.budget_s:
            print(f"out of time before {case.group}", file=sys.stderr)
            break
        records.append(run(case))
        torch.cuda.empty_cache() if len(records) % 8 == 0 else None
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": 0, "records": records}
    arguments.out.write_text(json.dumps(result, indent=0))
    print(f"{len(records)} cases in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
