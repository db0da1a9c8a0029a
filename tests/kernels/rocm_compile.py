"""Compile what the ROCm backend launches, ahead of time and with no card, and check what the compiler made of it.

The backend's own parts run here over tensors that hold nothing, with Triton told that the device is
an AMD one; every launch is compiled with the arguments, constants and options that it was made with,
and none is run.  A launch is good if it compiles, fits the target's shared memory and threads,
spills no register to memory, and has a matrix instruction where the kernel has a product.

``python rocm_compile.py`` compiles everything for every target, one process each (a compiler that
gives up ends its process), and ends with status 1 if anything is bad; ``--out`` writes the table.
``--target gfx942 --quick`` is one target's share of the default tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from isthmus.contract import AttentionSpec, DeviceState, Limits, QkNorm, RotarySpec, StepInputs, StepShape
from isthmus.plan import RowStart, StepPlan
from isthmus.reference.ops import ExpertWeights
from isthmus.sampling_params import RowSampling
from isthmus_rocm.targets import TARGETS, Target
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import TritonAttention
from isthmus_triton.inputs import TritonInputs
from isthmus_triton.kernels.linear import LinearScratch, split_linear, vector_linear
from isthmus_triton.launch import SplitLinear, VectorLinear
from isthmus_triton.ops import TritonOps
from isthmus_triton.sampling import TritonSampling

META = torch.device("meta")
MATRIX = {64: r"\bv_s?mfma_\w+", 32: r"\bv_s?wmma_\w+"}
"""Matrix instructions by the lanes of a wavefront."""
UNITS = {"gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 48, "gfx1201": 32}
"""Compute units as torch counts them, of one card of each kind; they size the fixed grids."""


@dataclass(frozen=True, kw_only=True)
class Result:
    target: str
    case: str
    kernel: str
    ok: bool
    problem: str = ""
    matrix: str = ""
    vgprs: int = 0
    sgprs: int = 0
    spilled: int = 0
    scratch_bytes: int = 0
    shared_bytes: int = 0
    threads: int = 0
    seconds: float = 0.0


def hands_over(assembly: str) -> bool:
    """Whether a counter that another program waits for is raised only after every wave's stores are done.

    One lane raises it, after a barrier, and waits for its own wave's stores alone: so each wave must
    have waited for its own before the barrier.
    """
    lines = [line.split(";")[0].strip() for line in assembly.splitlines()]
    releases = [at for at, line in enumerate(lines) if re.match(r"(global|buffer)_atomic_add", line)]
    for at in releases:
        barriers = [place for place in range(at) if re.match(r"s_barrier(_signal)?\b", lines[place])]
        releasing = any(re.match(r"(buffer|global)_wb|s_wait", line) for line in lines[at - 3 : at])
        if not releasing or not barriers:
            continue
        before = [line for line in lines[: barriers[-1]] if re.match(r"\w*_store_|s_wait", line)]
        last_store = max((i for i, line in enumerate(before) if "_store_" in line and "ds_" not in line), default=-1)
        waits = r"vmcnt\(0\)|vscnt null, 0x0|storecnt(_dscnt)? 0x0"
        if last_store >= 0 and not any(re.search(waits, line) for line in before[last_store:]):
            return False
    return True


class AheadOfTime:
    """A Triton driver for a device that is not there; compiles each launch and does not launch it."""

    def __init__(self, name: str, target: Target) -> None:
        self._name, self._target = name, target
        self._case = ""
        self._compiled: set[str] = set()
        self.results: list[Result] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self._name, self._target.wavefront)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        self._case = name
        yield

    def install(self) -> None:
        driver.set_active(self)
        # One thread, so that a compiler that gives up does so on the launch last reported.
        CompileAhead.begin = lambda ahead, launches: None
        run = JITFunction.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                compiled = run(function, *args, grid=grid, warmup=True, **kwargs)
            except Exception as error:  # report every launch, not the first bad one
                while error.__cause__ is not None:
                    error = error.__cause__
                self._add(Result(
                    target=self._name, case=self._case, kernel=function.__name__, ok=False,
                    problem=f"{type(error).__name__}: {str(error).strip()[-400:]}",
                ))  # fmt: skip
                return None
            if compiled.hash not in self._compiled:
                self._compiled.add(compiled.hash)
                self._add(self._judge(function.__name__, compiled, time.perf_counter() - begin))
            return compiled

        JITFunction.run = compile_only
        CompiledKernel.__getitem__ = lambda compiled, grid: lambda *args: None

    def _add(self, result: Result) -> None:
        self.results.append(result)
        print(json.dumps(asdict(result)), flush=True)

    def _judge(self, kernel: str, compiled: Any, seconds: float) -> Result:
        assembly = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            return max((int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

        matrix = re.findall(MATRIX[self._target.wavefront], assembly)
        shared, threads = int(compiled.metadata.shared), compiled.metadata.num_warps * self._target.wavefront
        spilled = field("vgpr_spill_count")
        problems = []
        if shared > self._target.shared_bytes:
            problems.append(f"{shared} B of shared memory, of {self._target.shared_bytes}")
        if threads > self._target.threads:
            problems.append(f"{threads} threads, of {self._target.threads}")
        if spilled:
            problems.append(f"{spilled} registers spilled")
        if not hands_over(assembly):
            problems.append("a barrier that does not await the stores handed over after it")
        if "tt.dot " in compiled.asm["ttir"] and not matrix:
            problems.append("a product without a matrix instruction")
        return Result(
            target=self._name,
            case=self._case,
            kernel=kernel,
            ok=not problems,
            problem="; ".join(problems),
            matrix=max(set(matrix), key=matrix.count) if matrix else "",
            vgprs=field("vgpr_count"),
            sgprs=field("sgpr_count"),
            spilled=spilled,
            scratch_bytes=field("private_segment_fixed_size"),
            shared_bytes=shared,
            threads=threads,
            seconds=round(seconds, 2),
        )


EIGHT_BITS = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One kind of attention layer, and how it is cached."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    """Of the cache; empty for ``dtype``."""
    block_size: int = 64
    window: int = 0
    softcap: float = 0.0
    qk_norm: bool = False
    rotary_dim: int = 0
    num_blocks: int = 4096
    """Where a cache is over 2 GiB the compiler may not address it in 32 bits."""

    @property
    def name(self) -> str:
        marks = [f"{self.heads}/{self.kv_heads}x{self.head_dim} {self.dtype} block {self.block_size}"]
        marks += [f"{self.kv_dtype} cache"] if self.kv_dtype else []
        marks += [f"window {self.window}"] if self.window else []
        marks += ["softcap"] if self.softcap else []
        marks += ["qk norm"] if self.qk_norm else []
        marks += ["over 2 GiB"] if self.num_blocks > 4096 else []
        return ", ".join(marks)

    def suits(self, target: Target) -> bool:
        return self.head_dim <= target.max_head_dim and (target.eight_bit_cache or self.kv_dtype != EIGHT_BITS)


QUICK_SHAPES = (
    Shape(),
    Shape(head_dim=64, heads=14, kv_heads=2, dtype="float16", block_size=16, qk_norm=True, window=512),
)
SHAPES = (
    *QUICK_SHAPES,
    Shape(head_dim=256, heads=8, kv_heads=4, softcap=50.0),
    Shape(dtype="float16"),
    *(Shape(block_size=size) for size in (16, 32, 128)),
    Shape(num_blocks=40_000),
    Shape(block_size=16, num_blocks=160_000, dtype="float16"),
    Shape(window=4096, softcap=50.0),
    Shape(heads=64, kv_heads=8, qk_norm=True),
    Shape(heads=32, kv_heads=32),
    Shape(heads=28, kv_heads=4),
    Shape(head_dim=64, heads=9, kv_heads=3),
    Shape(head_dim=96, heads=32, kv_heads=32, dtype="float16"),
    Shape(head_dim=128, heads=32, kv_heads=8, rotary_dim=64),
    Shape(head_dim=256, heads=8, kv_heads=4, window=4096, qk_norm=True),
    Shape(head_dim=256, heads=16, kv_heads=2),
    Shape(kv_dtype=EIGHT_BITS),
    Shape(kv_dtype=EIGHT_BITS, dtype="float16", block_size=16, window=4096),
    Shape(kv_dtype=EIGHT_BITS, head_dim=256, heads=8, kv_heads=4, softcap=50.0),
    Shape(kv_dtype=EIGHT_BITS, head_dim=64, heads=14, kv_heads=2, qk_norm=True),
)


def step_inputs(spans: int, length: int, limits: Limits) -> StepInputs:
    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    tokens = spans * length
    return StepInputs(
        token_ids=ints(tokens),
        positions=ints(tokens),
        slots=ints(tokens, dtype=torch.int64),
        span_rows=ints(spans),
        query_starts=ints(spans + 1),
        context_lengths=ints(spans),
        block_tables=ints(limits.max_rows + 1, limits.max_blocks_per_row),
        sample_tokens=ints(spans),
        sample_rows=ints(spans),
        num_tokens=tokens,
        num_spans=spans,
        num_samples=spans,
        max_query_length=length,
        max_context_length=limits.max_model_len,
    )


def attention(ahead: AheadOfTime, target: Target, units: int, shape: Shape, steps: tuple[tuple[int, int], ...]) -> None:
    """Steps of (spans, tokens each): decode, draft verification, prefill and a mixture's plan."""
    dtype = getattr(torch, shape.dtype)
    part = TritonAttention(META, target.launch, units, eight_bit_cache=target.eight_bit_cache)
    layer = AttentionSpec(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        window=shape.window,
        softcap=shape.softcap,
    )
    limits = Limits(
        max_rows=768,
        max_tokens=8192,
        max_model_len=8192,
        block_size=shape.block_size,
        num_blocks=shape.num_blocks,
        vocab_size=1024,
    )
    [cache] = part.allocate([layer], limits, shape.kv_dtype or shape.dtype)
    weight = torch.empty(shape.head_dim, device=META)
    rotary_dim = shape.rotary_dim or shape.head_dim
    rotary = RotarySpec(cos_sin=torch.empty(limits.max_model_len, rotary_dim, device=META), rotary_dim=rotary_dim)
    norm = QkNorm(query_weight=weight, key_weight=weight, epsilon=1e-6) if shape.qk_norm else None
    for spans, length in steps:
        with ahead.case(f"{shape.name}; {spans} spans of {length}"):
            inputs = step_inputs(spans, length, limits)
            qkv = torch.empty(
                inputs.num_tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, dtype=dtype, device=META
            )
            query = part.rotate_and_store(qkv, cache, layer, rotary, norm, inputs)
            part.attend(query, cache, layer, part.plan(inputs), inputs)


def layer_arithmetic(ahead: AheadOfTime, target: Target, dtypes: tuple[torch.dtype, ...]) -> None:
    ops = TritonOps(META, target.launch)
    for dtype in dtypes:
        for tokens, hidden, inner in ((1, 576, 1536), (64, 4096, 14336), (1024, 8192, 28672)):
            with ahead.case(f"layer arithmetic {str(dtype).removeprefix('torch.')}, {tokens} tokens of {hidden}"):
                x, residual = (torch.empty(tokens, hidden, dtype=dtype, device=META) for _ in range(2))
                weight = torch.empty(hidden, device=META)
                ops.rms_norm(x, weight, 1e-6)
                ops.add_rms_norm(x, residual, weight, 1e-6)
                for activation in ("silu", "gelu_tanh"):
                    ops.gated_activation(torch.empty(tokens, 2 * inner, dtype=dtype, device=META), activation)
                index = torch.empty(tokens, dtype=torch.int32, device=META)
                ops.embed(index, torch.empty(32_000, hidden, dtype=dtype, device=META), 1.5)
                ops.take_rows(x, index)


def experts(ahead: AheadOfTime, target: Target, dtypes: tuple[torch.dtype, ...]) -> None:
    ops = TritonOps(META, target.launch)
    for dtype in dtypes:
        for experts, top_k, hidden, inner in ((8, 2, 4096, 14336), (128, 8, 2048, 768)):
            for tokens in (1, 1024):
                with ahead.case(f"{experts} experts {str(dtype).removeprefix('torch.')}, {tokens} tokens"):
                    x, router = (torch.empty(tokens, size, dtype=dtype, device=META) for size in (hidden, experts))
                    gate_up = torch.empty(experts, 2 * inner, hidden, dtype=dtype, device=META)
                    weights = ExpertWeights(gate_up, torch.empty(experts, hidden, inner, dtype=dtype, device=META))
                    ops.experts(x, router, weights, top_k=top_k, renormalize=True, activation="silu")


def on_cdna(target: Target) -> bool:
    """Where a barrier awaits no stores."""
    return target.wavefront == 64


def products(
    ahead: AheadOfTime, target: Target, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
) -> None:
    """The products of few rows, which no table of this backend asks for yet."""
    scratch = LinearScratch(META)
    in_tile = 128 if target.shared_bytes > 65536 else 64
    for dtype in dtypes:
        weight = torch.empty(4096, 4096, dtype=dtype, device=META)
        with ahead.case(f"few rows {str(dtype).removeprefix('torch.')}"):
            row = torch.empty(1, 4096, dtype=dtype, device=META)
            vector_linear(row, weight, None, VectorLinear(out_tile=8, in_tile=512, warps=4))
            for splits in (1, 2):
                launch = SplitLinear(
                    out_tile=64, in_tile=in_tile, splits=splits, stages=2, warps=4, await_stores=on_cdna(target)
                )
                for rows in (16, 64):
                    split_linear(torch.empty(rows, 4096, dtype=dtype, device=META), weight, None, launch, scratch)


def step_preparation(ahead: AheadOfTime) -> None:
    """Row starts, block appends and a step's inputs, on the host's memory: what is launched is the same."""
    for block_size in (16, 64):
        limits = Limits(
            max_rows=4, max_tokens=64, max_model_len=256, block_size=block_size, num_blocks=32, vocab_size=64
        )
        inputs = TritonInputs(torch.device("cpu"))
        state = inputs.allocate(limits)
        start = RowStart(
            row=0, tokens=np.arange(40, dtype=np.int32), num_prompt_tokens=40, sampling=RowSampling(max_tokens=1)
        )
        plan = StepPlan(
            step=0,
            starts=(start,),
            block_rows=np.zeros(1, np.int32),
            block_indices=np.zeros(1, np.int32),
            block_ids=np.ones(1, np.int32),
            span_rows=np.zeros(1, np.int32),
            span_starts=np.zeros(1, np.int32),
            span_lengths=np.full(1, 40, np.int32),
            span_samples=np.ones(1, np.bool_),
        )
        with ahead.case(f"step preparation, block {block_size}"):
            inputs.upload(plan, state)
            inputs.build(state, StepShape(tokens=64, spans=4, samples=4))


def sampling(ahead: AheadOfTime, target: Target, vocabularies: tuple[int, ...]) -> None:
    for vocab in vocabularies:
        limits = Limits(
            max_rows=256, max_tokens=256, max_model_len=4096, block_size=64, num_blocks=64, vocab_size=vocab
        )
        part = TritonSampling(META, target.launch)
        state = part.allocate(limits)
        device = DeviceState(
            tokens=torch.empty(257, 4112, dtype=torch.int32, device=META)[:, :4097],
            block_tables=torch.empty(257, 64, dtype=torch.int32, device=META),
            num_prompt_tokens=torch.empty(257, dtype=torch.int32, device=META),
        )
        with ahead.case(f"sampling of {vocab} tokens"):
            part.sample(torch.empty(64, vocab, device=META), step_inputs(64, 1, limits), device, state, -1)


def compile_target(name: str, quick: bool) -> int:
    target = TARGETS[name]
    ahead = AheadOfTime(name, target)
    ahead.install()
    steps: tuple[tuple[int, int], ...] = ((16, 1), (1, 512)) if quick else ((16, 1), (300, 1), (8, 6), (4, 512))
    for shape in QUICK_SHAPES if quick else SHAPES:
        if shape.suits(target):
            attention(ahead, target, UNITS[name], shape, steps)
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16)
    layer_arithmetic(ahead, target, dtypes)
    experts(ahead, target, dtypes)
    products(ahead, target, dtypes)
    step_preparation(ahead)
    sampling(ahead, target, (128_256,) if quick else (49_152, 128_256, 262_144))
    return 0 if ahead.results and all(result.ok for result in ahead.results) else 1


def run_target(name: str, quick: bool) -> tuple[list[dict[str, Any]], str]:
    """One target's results from a process of its own, and what that process said if it died."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--target", name, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as cache:
        run = subprocess.run(
            command, env=environment | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False
        )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    died = run.returncode not in (0, 1) or not results or (run.returncode == 1 and all(r["ok"] for r in results))
    return results, f"{name}: the compiler's process ended with {run.returncode}: {run.stderr[-800:]}" if died else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.target:
        return compile_target(options.target, options.quick)
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = list(pool.map(lambda name: run_target(name, options.quick), TARGETS))
    results = [result for rows, _ in runs for result in rows]
    bad = [f"{r['target']} {r['kernel']} ({r['case']}): {r['problem']}" for r in results if not r["ok"]]
    bad += [death for _, death in runs if death]
    summary = summarise(results)
    for name in TARGETS:
        mine = [result for result in results if result["target"] == name]
        print(f"{name}: {sum(result['ok'] for result in mine)} of {len(mine)} programs good")
    print("\n".join([*bad, *markdown(summary)]))
    if options.out:
        report = {
            "command": "make test-rocm",
            "triton": triton.__version__,
            "torch": torch.__version__.partition("+")[0],
            "failed": bad,
            "kernels": summary,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad else 0


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kernel and target: how many programs, how many of them good, and the most that any of them takes."""
    most = ("vgprs", "shared_bytes", "threads", "spilled", "scratch_bytes")
    rows = []
    for kernel in sorted({result["kernel"] for result in results}):
        for target in TARGETS:
            mine = [r for r in results if (r["kernel"], r["target"]) == (kernel, target)]
            if mine:
                row = {"kernel": kernel, "target": target, "programs": len(mine), "good": sum(r["ok"] for r in mine)}
                row |= {field: max(r[field] for r in mine) for field in most}
                rows.append(row | {"matrix": sorted({r["matrix"] for r in mine} - {""})})
    return rows


def markdown(summary: list[dict[str, Any]]) -> list[str]:
    """Kernels by targets: good of compiled programs, most registers of a lane, most KiB of shared memory."""
    cells = {
        (row["kernel"], row["target"]): f"{row['good']}/{row['programs']} · {row['vgprs']} · "
        f"{row['shared_bytes'] / 1024:.3g}"
        for row in summary
    }
    kernels = sorted({row["kernel"] for row in summary})
    return [
        f"| kernel | {' | '.join(TARGETS)} |",
        "|---" * (len(TARGETS) + 1) + "|",
        *(
            f"| {kernel.removesuffix('_kernel')} | {' | '.join(cells.get((kernel, t), '-') for t in TARGETS)} |"
            for kernel in kernels
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
