"""Compile every kernel for the target named on the command line, and check what the compiler made of it.

Ends with status 1 if a kernel does not compile, needs more shared memory than the target's program
may take, or spills registers.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isthmus_triton.kernels import (
    adjust,
    decode_attention,
    elementwise,
    experts,
    linear,
    logprobs,
    norm,
    plan,
    prefill_attention,
    prepare,
    rotate_and_store,
    rounds,
    sample,
    shared_attention,
)
from isthmus_triton.launch import launch_table

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
}


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Any
    signature: str  # "name:type name:type ..."; the rest of the arguments are constants
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


def attention_cases(arch: str) -> Iterator[Case]:
    table = launch_table(arch)
    shapes = [(128, "bf16", 2, "bf16"), (64, "fp16", 2, "fp16"), (256, "bf16", 2, "bf16"), (128, "fp32", 4, "fp32")]
    if arch != "sm_80":  # which has no such float
        shapes += [(128, "bf16", 2, "fp8e4nv"), (64, "fp32", 2, "fp8e4nv")]
    for dim, dtype, itemsize, kept in shapes:
        label = dtype if kept == dtype else f"{dtype} over {kept}"
        row_bytes = dim * itemsize
        shape = {"HEAD_DIM": dim, "DIM": dim, "BLOCK_SIZE": 16 if dim == 64 else 64, "GROUP": 4}
        switches = {"HAS_WINDOW": False, "HAS_SOFTCAP": False, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
        decode = table.decode_for(row_bytes)
        for rows in (16, 32):
            yield Case(
                f"decode {dim} {label} rows={rows}",
                decode_attention.decode_kernel,
                f"query:*{dtype} keys:*{kept} values:*{kept} out:*{dtype} block_tables:*i32 programs:*i32 "
                "short_spans:*i32 partial_out:*fp32 partial_max:*fp32 partial_sum:*fp32 arrivals:*i32 "
                "shared_out:*fp32 shared_max:*fp32 shared_sum:*fp32 table_stride:i32 kv_heads:i32 block_stride:i32 "
                "window:i32 scale:fp32 softcap:fp32",
                {
                    **shape,
                    **switches,
                    "SHARED": rows == 16,
                    "ROWS": rows,
                    "GROUP_TILE": 4,
                    "MANY": decode.merged // (4 * dim),
                    "KEY_TILE": decode.key_tile,
                    "STAGES": decode.stages,
                },
                decode.warps,
            )
        prefill = table.prefill_for(row_bytes)
        yield Case(
            f"prefill {dim} {label}",
            prefill_attention.prefill_kernel,
            f"query:*{dtype} keys:*{kept} values:*{kept} out:*{dtype} context_lengths:*i32 query_starts:*i32 "
            "span_rows:*i32 block_tables:*i32 programs:*i32 long_tiles:*i32 num_spans:i32 table_stride:i32 "
            "kv_heads:i32 block_stride:i32 window:i32 scale:fp32 softcap:fp32",
            {
                **shape,
                **switches,
                "QUERY_TILE": prefill.query_tile,
                "KEY_TILE": prefill.key_tile,
                "STAGES": prefill.stages,
            },
            prefill.warps,
        )
        yield Case(
            f"shared {dim} {label}",
            shared_attention.shared_kernel,
            f"query:*{dtype} keys:*{kept} values:*{kept} block_tables:*i32 programs:*i32 short_spans:*i32 "
            "shared_out:*fp32 shared_max:*fp32 shared_sum:*fp32 table_stride:i32 kv_heads:i32 block_stride:i32 "
            "scale:fp32 softcap:fp32",
            {
                **shape,
                "HAS_SOFTCAP": False,
                "PRECISION": "ieee",
                "KEY_TILE": decode.key_tile,
                "STAGES": prefill.stages,
            },
            prefill.warps,
        )
        yield Case(
            f"rotate {dim} {label}",
            rotate_and_store.rotate_and_store_kernel,
            f"qkv:*{dtype} query_out:*{dtype} keys:*{kept} values:*{kept} cos_sin:*fp32 query_weight:*fp32 "
            "key_weight:*fp32 positions:*i32 slots:*i64 heads:i32 kv_heads:i32 block_stride:i32 epsilon:fp32",
            {
                "HEAD_DIM": dim,
                "DIM": dim,
                "ROTARY": dim,
                "BLOCK_SIZE": shape["BLOCK_SIZE"],
                "HEADS_EACH": table.heads_each,
                "QK_NORM": dim == 64,
            },
        )
    yield Case(
        "plan",
        plan.plan_kernel,
        "context_lengths:*i32 query_starts:*i32 span_rows:*i32 block_tables:*i32 programs:*i32 short_spans:*i32 "
        "long_tiles:*i32 long_lengths:*i32 num_spans:i32 num_programs:i32 kv_heads:i32 window:i32 short_length:i32 "
        "least_tiles:i32 table_stride:i32 shared_programs:i32 least_shared:i32",
        {
            "GROUP": 4,
            "KEY_TILE": 64,
            "QUERY_TILE": 128,
            "SPANS": 1024,
            "PROGRAMS": 512,
            "SEARCH": 11,
            "BLOCK_SIZE": 64,
            "SHARE": True,
        },
        8,
    )


def other_cases(arch: str) -> Iterator[Case]:
    yield Case(
        "add rms norm",
        norm.rms_norm_kernel,
        "x:*bf16 residual:*bf16 weight:*fp32 out:*bf16 row_stride:i32 hidden:i32 epsilon:fp32",
        {"COLUMNS": 4096, "ADD": True},
        8,
    )
    yield Case(
        "gated activation",
        elementwise.gated_activation_kernel,
        "gate_up:*bf16 out:*bf16 inner:i32 out_stride:i32",
        {"BLOCK": 2048, "SILU": True},
    )
    yield Case(
        "gather rows",
        elementwise.gather_rows_kernel,
        "table:*bf16 index:*i32 out:*bf16 width:i32 scale:fp32",
        {"BLOCK": 2048, "SCALED": True},
    )
    yield Case(
        "vector linear",
        linear.vector_linear_kernel,
        "x:*bf16 weight:*bf16 bias:*bf16 out:*bf16 out_features:i32 in_features:i32",
        {"OUT_TILE": 8, "IN_TILE": 512, "HAS_BIAS": False, "EVEN": True},
    )
    yield Case(
        "split linear",
        linear.split_linear_kernel,
        "x:*bf16 weight:*bf16 bias:*bf16 out:*bf16 partial:*fp32 arrivals:*i32 rows:i32 out_features:i32 "
        "in_features:i32",
        {
            "ROWS": 16,
            "OUT_TILE": 64,
            "IN_TILE": 64 if arch == "gfx942" else 128,
            "SPLITS": 4,
            "STAGES": 2 if arch == "gfx942" else 4,
            "HAS_BIAS": True,
            "PRECISION": "tf32",
            "AHEAD": max((getattr(rule.launch, "ahead", 0) for rule in launch_table(arch).linear), default=0),
        },
    )


def expert_cases(arch: str) -> Iterator[Case]:
    for dtype in ("bf16", "fp16", "fp32"):
        yield Case(
            f"route {dtype}",
            experts.route_kernel,
            f"logits:*{dtype} shares:*fp32 lists:*i32 counts:*i32 tokens:i32 experts:i32",
            {"TOP_K": 10, "CHOICES": 16, "EXPERTS": 512, "RENORMALIZE": True},
            1,
        )
        for launch in launch_table(arch).experts_in(4 if dtype == "fp32" else 2):
            for gated in (True, False):
                yield Case(
                    f"expert linear {dtype} rows={launch.row_tile}{' gated' if gated else ''}",
                    experts.expert_linear_kernel,
                    f"x:*{dtype} weight:*{dtype} out:*{dtype} shares:*fp32 lists:*i32 counts:*i32 tokens:i32 "
                    "row_tiles:i32 row_pairs:i32 experts:i32 out_features:i32 in_features:i32",
                    {
                        "EXPERTS": 128,
                        "ROW_TILE": launch.row_tile,
                        "OUT_TILE": launch.out_tile,
                        "IN_TILE": launch.in_tile,
                        "STAGES": launch.stages,
                        "GATED": gated,
                        "SILU": True,
                        "PRECISION": "ieee",
                    },
                    launch.warps,
                )
    yield Case(
        "combine experts",
        experts.combine_kernel,
        "parts:*bf16 out:*bf16 hidden:i32",
        {"TOP_K": 8, "BLOCK": 1024},
    )


def step_cases(arch: str) -> Iterator[Case]:
    rows = "row_parameters:*i64 sample_rows:*i32 sample_tokens:*i32 positions:*i32"
    yield Case(
        "adjust",
        adjust.adjust_kernel,
        f"logits:*fp32 invalid_before:*i32 {rows} tokens:*i32 num_prompt_tokens:*i32 seen_bits:*i32 queued:*i32 "
        "vocab:i32 history_stride:i32 bit_words:i32",
        {"QUEUES": 4, "BLOCK": 1024},
    )
    sliced = {"QUEUES": 4, "SLICE": 8192, "BLOCK": 1024}
    yield Case(
        "slices",
        sample.slices_kernel,
        "logits:*fp32 slices:*fp32 slice_ids:*i32 row_words:*i32 queued:*i32 queue:*i32 "
        f"group_tops:*fp32 {rows} token_keys:*i32 vocab:i32",
        {"GROUP": 128, "WIDE": 1024, **sliced},
    )
    for number, name in ((0, "check"), (1, "round"), (3, "last round")):
        yield Case(
            name,
            rounds.round_kernel,
            "logits:*fp32 slices:*fp32 slice_ids:*i32 row_words:*i32 row_bounds:*fp32 queued:*i32 "
            f"queue:*i32 {rows} token_keys:*i32 vocab:i32 num_slices:i32",
            {"ROUND": number, "SLICES": 16, **sliced},
        )
    yield Case(
        "choose",
        sample.choose_kernel,
        "logits:*fp32 slices:*fp32 slice_ids:*i32 row_words:*i32 group_tops:*fp32 some_x:*fp32 some_ids:*i32 "
        f"invalid_before:*i32 {rows} token_keys:*i32 tokens:*i32 sampled:*i32 invalid:*i1 vocab:i32 history_stride:i32 "
        "num_slices:i32 num_groups:i32",
        {"SLICES": 16, "GROUPS": 1024, "MOST": 2048, "BLOCK": 8192},
        launch_table(arch).choose_warps,
    )
    yield Case(
        "slice logprobs",
        logprobs.slice_logprobs_kernel,
        "logits:*fp32 tokens:*i32 masses:*fp32 above:*i32 likeliest:*i64 row_stride:i32 vocab:i32 count:i32",
        {"SLICE": logprobs.SLICE},
    )
    yield Case(
        "merge logprobs",
        logprobs.merge_logprobs_kernel,
        "logits:*fp32 tokens:*i32 masses:*fp32 above:*i32 likeliest:*i64 chosen:*fp32 ranks:*i32 top_ids:*i32 "
        "top_logprobs:*fp32 row_stride:i32 count:i32 num_slices:i32",
        {"SLICES": 32},
    )
    yield Case(
        "start rows",
        prepare.start_rows_kernel,
        "headers:*i32 changes:*i32 tokens:*i32 block_tables:*i32 num_prompt_tokens:*i32 num_starts:i32 "
        "history_stride:i32 table_stride:i32 table_width:i32",
        {"BLOCK": 1024},
    )
    yield Case(
        "append blocks",
        prepare.append_blocks_kernel,
        "changes:*i32 block_tables:*i32 appends:i32 table_stride:i32",
        {"BLOCK": 128},
    )
    yield Case(
        "build",
        prepare.build_kernel,
        "span_rows:*i32 span_starts:*i32 query_starts:*i32 tokens:*i32 block_tables:*i32 token_ids:*i32 "
        "positions:*i32 slots:*i64 num_spans:i32 num_tokens:i32 history_stride:i32 table_stride:i32",
        {"BLOCK_SIZE": 64, "BLOCK": 512},
    )


def compile_case(case: Case, target: GPUTarget) -> Any:
    names = case.kernel.arg_names
    signature = dict(part.split(":") for part in case.signature.split())
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(case.kernel.fn).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    if "OVERLAP" in defaults:
        defaults["OVERLAP"] = launch_table(sys.argv[1]).overlap
    case = replace(case, constants={**defaults, **case.constants})
    missing = set(names) - set(signature) - set(case.constants)
    assert not missing, f"{case.name}: no type for {sorted(missing)}"
    # Pointers and sizes are multiples of 16 in every real call.
    even = (
        "block_stride",
        "row_stride",
        "out_stride",
        "hidden",
        "inner",
        "width",
        "vocab",
        "in_features",
        "out_features",
    )
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature.get(name, "")[:1] == "*" or name in even
    }
    signature.update(dict.fromkeys(case.constants, "constexpr"))
    source = ASTSource(
        fn=case.kernel, signature={name: signature[name] for name in names}, constexprs=case.constants, attrs=divisible
    )
    return triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})


def spills(compiled: Any) -> int:
    # ptxas declares local memory in the binary only where it spills or indexes an array.
    return sum(int(n) for n in re.findall(r"\.local .*\[(\d+)\]", compiled.asm["ptx"]))


def main() -> int:
    arch = sys.argv[1]
    target, most_shared = TARGETS[arch]
    failed = 0
    for case in (*attention_cases(arch), *other_cases(arch), *expert_cases(arch), *step_cases(arch)):
        if len(sys.argv) > 2 and sys.argv[2] not in case.name:
            continue
        begin = time.perf_counter()
        try:
            compiled = compile_case(case, target)
        except Exception as error:  # report every kernel, not the first
            failed += 1
            while error.__cause__ is not None:
                error = error.__cause__
            print(f"FAILED {case.name}: {type(error).__name__}: {str(error)[-900:]}")
            continue
        shared, spilled = compiled.metadata.shared, spills(compiled)
        bad = shared > most_shared or spilled > 0
        failed += bad
        print(
            f"{'BAD   ' if bad else 'ok    '} {case.name}: {shared} B shared, {spilled} spilled, "
            f"{time.perf_counter() - begin:.1f} s"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
