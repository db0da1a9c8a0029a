"""``python -m isthmus_cpu.selftest``: are the compiled kernels right on this processor, and how fast are they?

Compares them with torch and prints, as JSON, every comparison and the rates of products, attention and
memory.  Ends with 1 if a comparison fails.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, RotarySpec, StepInputs
from isthmus.reference import ReferenceAttention, ReferenceOps
from isthmus_cpu.attention import PanelAttention
from isthmus_cpu.build import kernels_library
from isthmus_cpu.library import Kind, Library, Pool
from isthmus_cpu.machine import processor_name, usable_cores
from isthmus_cpu.ops import PanelOps
from isthmus_cpu.pages import large_pages
from isthmus_cpu.runner import Runner

REPEATS = 15


@dataclass(frozen=True, slots=True)
class Rig:
    """The kernels over some threads."""

    library: Library
    pool: Pool
    runner: Runner
    ops: PanelOps
    attention: PanelAttention

    @classmethod
    def open(cls, threads: int) -> Rig:
        """Raises :class:`isthmus.errors.BackendUnavailable` where there are no kernels."""
        library = Library(kernels_library())
        pool = Pool(library, threads)
        runner = Runner(pool)
        ops = PanelOps(library, runner, threads)
        return cls(library, pool, runner, ops, PanelAttention(runner, library.value_padding))

    def close(self) -> None:
        self.ops.close()
        self.pool.close()


@dataclass(frozen=True, slots=True)
class Comparison:
    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(rig: Rig) -> list[Comparison]:
    reference = ReferenceOps(torch.device("cpu"))
    x, weight = random(33, 576), random(576, seed=1)
    gate_up = random(33, 2 * 576, seed=2)
    found = [
        *compare_linears(rig),
        Comparison(
            "rms_norm", difference(rig.ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)), 1e-5
        ),
        *(
            Comparison(
                name,
                difference(rig.ops.gated_activation(gate_up, name), reference.gated_activation(gate_up, name)),
                1e-5,
            )
            for name in ("silu", "gelu_tanh")
        ),
        *compare_attention(rig),
    ]
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """NaN counts as infinitely far."""
    far = (ours.double() - theirs.double()).abs().max().item()
    return float("inf") if far != far else far


def compare_linears(rig: Rig) -> list[Comparison]:
    found = []
    rounds = rig.library.instructions == "AVX512-BF16"
    for dtype in (torch.float32, torch.bfloat16):
        for out, depth in ((37, 65), (960, 576), (576, 1536)):
            weight, bias = (random(out, depth) * depth**-0.5).to(dtype), random(out, seed=1)
            packed = rig.ops.prepare_linear(weight.clone(), bias)
            worst = 0.0
            for rows in (*range(1, 14), 24, 25, 70, 97, 200):
                x = random(rows, depth, seed=rows)
                seen = x.bfloat16().double() if rounds and dtype == torch.bfloat16 else x.double()
                wanted = F.linear(seen, weight.double(), bias.double())
                worst = max(worst, difference(rig.ops.linear(x, packed), wanted))
            found.append(Comparison(f"linear {out}x{depth} {str(dtype).removeprefix('torch.')}", worst, 2e-5))
    return found


def attention_inputs(spans: int, length: int, context: int) -> tuple[Limits, StepInputs]:
    """``spans`` rows that each compute the last ``length`` of ``context`` positions."""
    size, tokens = 16, spans * length
    blocks = -(-context // size)
    limits = Limits(
        max_rows=spans,
        max_tokens=tokens,
        max_model_len=context,
        block_size=size,
        num_blocks=1 + spans * blocks,
        vocab_size=2,
    )
    order = torch.randperm(spans * blocks, generator=torch.Generator().manual_seed(1)).int() + 1
    tables = torch.zeros(spans + 1, blocks, dtype=torch.int32)
    tables[:spans] = order.view(spans, blocks)
    positions = torch.arange(context - length, context, dtype=torch.int32).repeat(spans)
    rows = torch.arange(spans).repeat_interleave(length)
    slots = tables[rows, positions.long() // size].long() * size + positions % size
    inputs = StepInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int32),
        positions=positions,
        slots=slots,
        span_rows=torch.arange(spans, dtype=torch.int32),
        query_starts=torch.arange(spans + 1, dtype=torch.int32) * length,
        context_lengths=torch.full((spans,), context, dtype=torch.int32),
        block_tables=tables,
        sample_tokens=torch.zeros(spans, dtype=torch.int32),
        sample_rows=torch.zeros(spans, dtype=torch.int32),
        num_tokens=tokens,
        num_spans=spans,
        num_samples=spans,
        max_query_length=length,
        max_context_length=context,
    )
    return limits, inputs


def compare_attention(rig: Rig) -> list[Comparison]:
    found = []
    reference = ReferenceAttention(torch.device("cpu"))
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        for dim, window, softcap in ((64, 0, 0.0), (80, 50, 0.0), (128, 0, 20.0)):
            spec = AttentionSpec(heads=6, kv_heads=2, head_dim=dim, scale=dim**-0.5, window=window, softcap=softcap)
            limits, inputs = attention_inputs(3, 150, 150)
            rotary = RotarySpec(cos_sin=random(150, dim, seed=3), rotary_dim=dim)
            qkv = random(inputs.num_tokens, 10 * dim, seed=4)
            out = []
            for part in (rig.attention, reference):
                cache = part.allocate([spec], limits, dtype)[0]
                query = part.rotate_and_store(qkv, cache, spec, rotary, None, inputs)  # type: ignore[arg-type]
                out.append(part.attend(query, cache, spec, part.plan(inputs), inputs))  # type: ignore[arg-type]
            found.append(Comparison(f"attention {dim} {window} {softcap:g} {dtype}", difference(*out), tolerance))
    return found


def seconds(call: Callable[[], object], repeats: int = REPEATS) -> dict[str, float]:
    """Least and median of some repeats, after one that does not count."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return {"least_s": min(taken), "median_s": statistics.median(taken), "most_s": max(taken)}


def rated(amount: float, unit: str, taken: dict[str, float]) -> dict[str, float]:
    """``amount`` a second, in units of 1e9, at the least and the median time."""
    return {
        f"best_{unit}": round(amount / taken["least_s"] / 1e9, 1),
        f"median_{unit}": round(amount / taken["median_s"] / 1e9, 1),
    }


def read_bandwidth(rig: Rig, megabytes: int = 256) -> dict[str, float]:
    """Of a pass over memory far larger than the caches, by all threads."""
    memory = large_pages(megabytes << 20)
    memory.fill_(1)
    taken = seconds(lambda: rig.runner.run(Kind.READ, memory, (memory,), (memory.numel(),), rows=1))
    return rated(memory.numel(), "gb_s", taken)


def product_rates(rig: Rig, rows: int, weights: int = 24) -> dict[str, float]:
    """Of a pass over bfloat16 weights that do not fit into the caches together."""
    packed = [rig.ops.prepare_linear(random(3072, 576, seed=n).bfloat16()) for n in range(weights)]
    x = random(rows, 576)

    def multiply() -> None:
        for weight in packed:
            rig.ops.linear(x, weight)

    taken = seconds(multiply)
    size = sum(weight.packed.numel() for weight in packed)
    return {**rated(size, "gb_s", taken), **rated(size * rows, "gflop_s", taken)}


def attention_rates(rig: Rig, spans: int, length: int, context: int) -> dict[str, float]:
    spec = AttentionSpec(heads=9, kv_heads=3, head_dim=64, scale=0.125)
    limits, inputs = attention_inputs(spans, length, context)
    cache = rig.attention.allocate([spec], limits, "bfloat16")[0]
    query = random(inputs.num_tokens, 9, 64)
    plan = rig.attention.plan(inputs)
    taken = seconds(lambda: rig.attention.attend(query, cache, spec, plan, inputs))
    seen = spans * length * (context - (length - 1) / 2)
    return {**rated(4 * seen * 9 * 64, "gflop_s", taken), **rated(spans * context * 3 * 64 * 4, "gb_s", taken)}


def measure(rig: Rig) -> dict[str, Any]:
    return {
        "read_bandwidth": read_bandwidth(rig),
        "linear_bfloat16": {str(rows): product_rates(rig, rows) for rows in (1, 2, 4, 8, 16, 32, 64, 256)},
        "attention": {
            f"{spans} spans of {length} over {context}": attention_rates(rig, spans, length, context)
            for spans, length, context in ((1, 1, 1024), (32, 1, 192), (1, 128, 128), (1, 512, 512))
        },
    }


def main() -> int:
    threads = usable_cores()
    torch.set_num_threads(threads)
    rig = Rig.open(threads)
    try:
        comparisons = compare(rig)
        rates = measure(rig)
    finally:
        rig.close()
    result = {
        "processor": processor_name(),
        "instructions": rig.library.instructions,
        "threads": threads,
        "passed": all(comparison.passed for comparison in comparisons),
        "comparisons": [asdict(comparison) | {"passed": comparison.passed} for comparison in comparisons],
        "rates": rates,
    }
    print(json.dumps(result, indent=1))  # noqa: T201
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
