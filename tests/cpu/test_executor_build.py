"""What building an executor settles on, what it says where something does not fit, and its arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.contract import AttentionSpec, Capabilities, GraphScope, Limits, ShapePolicy, SpanMix
from isthmus.errors import IsthmusError, OutOfMemory, Unsupported
from isthmus.executor import Executor, ExecutorReport, build_executor
from isthmus.executor.dummy import largest_plan
from isthmus.executor.shapes import decode_sizes
from isthmus.executor.sizing import device_budget, enough_blocks, size_cache, unified_budget
from isthmus.executor.split import split
from isthmus.model.source import ModelSource
from isthmus.model.spec import ExpertSpec, LayerSpec, ModelSpec, RopeSpec
from isthmus.plan import StepPlan
from isthmus.reference import REFERENCE_CAPABILITIES, ReferenceBackend, ReferenceMemory

ATTENTION = AttentionSpec(heads=2, kv_heads=1, head_dim=8, scale=8**-0.5)
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden=16,
    inner=24,
    layers=(LayerSpec(attention=ATTENTION),) * 2,
    ropes=(RopeSpec(rotary_dim=8),),
    max_position=1000,
    norm_epsilon=1e-5,
    dtype="bfloat16",
)
SOURCE = ModelSource(name="tiny", path=Path("tiny"), kind="safetensors")
TOKEN_BYTES = 2 * 2 * 8 * 2  # layers, keys and values, head_dim, bfloat16


class SmallMemory(ReferenceMemory):
    """A device of its own with ``total`` bytes, all of them left."""

    def __init__(self, total: int, available: int | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.total, self.available = total, total if available is None else available

    def total_bytes(self) -> int:
        return self.total

    def available_bytes(self) -> int:
        return self.available


def build(
    *,
    spec: ModelSpec = SPEC,
    memory: ReferenceMemory | None = None,
    model: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    graphs: bool = True,
    **changes: Any,
) -> tuple[Executor, ExecutorReport]:
    backend = ReferenceBackend(
        capabilities=dataclasses.replace(REFERENCE_CAPABILITIES, **changes), memory=memory or SmallMemory(2**20)
    )
    options = EngineOptions(
        model=ModelOptions(model="tiny", random_weights=True, **(model or {})),
        cache=CacheOptions(**(cache or {})),
        scheduler=SchedulerOptions(**(scheduler or {})),
        backend=BackendOptions(graphs=graphs),
    )
    return build_executor(options, backend, SOURCE, spec, False)


def test_defaults_come_from_the_model_and_the_backend() -> None:
    executor, report = build(default_max_rows=12, default_max_tokens=300)
    assert report.dtype == report.kv_dtype == "bfloat16"
    limits = executor.limits
    assert (limits.max_rows, limits.max_tokens, limits.max_model_len, limits.block_size) == (12, 300, 1000, 16)
    assert limits.num_blocks == int(0.9 * 2**20) // (16 * TOKEN_BYTES)
    assert report.kv_bytes == limits.num_blocks * 16 * TOKEN_BYTES
    assert report.notes == []
    assert report.providers["attention"] == "ReferenceAttention"
    assert executor.max_steps_in_flight == 1


def test_asked_for() -> None:
    executor, report = build(
        model={"dtype": "float32", "max_model_len": 100},
        cache={"block_size": 32, "num_blocks": 7, "kv_dtype": "float16"},
        scheduler={"max_num_seqs": 3, "max_num_batched_tokens": 50, "overlap": True},
        max_steps_in_flight=2,
    )
    assert (report.dtype, report.kv_dtype) == ("float32", "float16")
    assert executor.limits == Limits(
        max_rows=3, max_tokens=50, max_model_len=100, block_size=32, num_blocks=8, vocab_size=64
    )
    assert executor.max_steps_in_flight == 2
    alone, _ = build(scheduler={"overlap": False}, max_steps_in_flight=2)
    assert alone.max_steps_in_flight == 1


def test_it_runs() -> None:
    executor, _ = build(scheduler={"max_num_seqs": 4})
    result = executor.run(largest_plan(executor.limits, Capabilities()))
    assert result.tokens.shape == (4, 1) and not result.invalid.any()


def test_a_checkpoint_dtype_that_the_backend_lacks_becomes_its_first() -> None:
    _, report = build(dtypes=("float32", "float16"), kv_dtypes=("float16",))
    assert (report.dtype, report.kv_dtype) == ("float32", "float16")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": {"dtype": "float64"}}, Unsupported, "computes in float32, bfloat16, float16, not in 'float64'"),
        ({"cache": {"kv_dtype": "int4"}}, Unsupported, "keeps KV in"),
        ({"cache": {"block_size": 5}}, Unsupported, "it takes 1, 2, 4, 8, 16, 32, 64, 128"),
        ({"model": {"max_model_len": 1001}}, IsthmusError, "positions end at 1000"),
        ({"max_head_dim": 4}, Unsupported, "heads of 8 numbers"),
        ({"model": {"max_model_len": 320}, "cache": {"num_blocks": 19}}, OutOfMemory, "to at most 304"),
        ({"model": {"max_model_len": 320}, "cache": {"memory_bytes": 1}}, OutOfMemory, "holds 0 tokens; give"),
        ({"cache": {"num_blocks": 15}}, OutOfMemory, "to at most 240"),
    ],
    ids=str,
)
def test_what_is_not_to_be_had(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build(**changes)


def test_features_that_are_not_declared() -> None:
    def with_layer(**changes: Any) -> ModelSpec:
        attention = dataclasses.replace(ATTENTION, **changes)
        return dataclasses.replace(SPEC, layers=(LayerSpec(attention=attention),))

    with pytest.raises(Unsupported, match="window of 40 tokens"):
        build(spec=with_layer(window=40), sliding_window=False)
    build(spec=with_layer(window=40), sliding_window=False, model={"max_model_len": 40})
    with pytest.raises(Unsupported, match="soft-capped"):
        build(spec=with_layer(softcap=5.0), logit_softcap=False)
    experts = LayerSpec(attention=ATTENTION, experts=ExpertSpec(num_experts=2, top_k=1, inner=8, renormalize=True))
    with pytest.raises(Unsupported, match="mixture of experts"):
        build(spec=dataclasses.replace(SPEC, layers=(experts,)), experts=False)


def test_the_models_own_length_is_lowered_to_what_fits() -> None:
    executor, report = build(cache={"num_blocks": 20})
    assert executor.limits.max_model_len == 320
    assert executor.limits.num_blocks == 21
    assert report.notes == ["max_model_len is 320 instead of the model's 1000: num_blocks=20 holds no longer sequence"]


def test_the_largest_step_is_measured_before_the_cache_is_sized() -> None:
    """Memory that the trial step takes is not given to the cache."""

    class Shrinking(SmallMemory):
        launches = 0

        def launch(self, step: Any) -> Any:
            self.launches += 1
            if self.launches == 1:
                self.available -= 2**19
            return super().launch(step)

    executor, report = build(memory=Shrinking(2**20))
    assert report.workspace_bytes == 2**19
    assert executor.limits.num_blocks == (int(0.9 * 2**20) - 2**19) // (16 * TOKEN_BYTES)


def test_unified_memory_is_shared_with_the_machine() -> None:
    executor, _ = build(memory=SmallMemory(2**30, 2**22), unified_memory=True, default_max_rows=4)
    assert executor.limits.num_blocks == 1 + 2 * 63  # two sequences of full length; 4 rows of 256 are fewer
    scarce, _ = build(memory=SmallMemory(2**30, 2**19), unified_memory=True)
    assert scarce.limits.num_blocks == 2**19 // 4 // (16 * TOKEN_BYTES)
    asked, _ = build(memory=SmallMemory(2**30, 2**19), unified_memory=True, cache={"memory_bytes": 2**21})
    assert asked.limits.num_blocks == 2**21 // (16 * TOKEN_BYTES)


def test_budgets() -> None:
    assert device_budget(CacheOptions(), 1000, 700) == 600
    assert device_budget(CacheOptions(memory_fraction=0.5), 1000, 700) == 200
    assert device_budget(CacheOptions(memory_bytes=650), 1000, 700) == 650
    assert device_budget(CacheOptions(memory_bytes=800), 1000, 700) == 700
    assert unified_budget(CacheOptions(), 1000, 10**9) == 250
    assert unified_budget(CacheOptions(), 1000, 40) == 40
    assert enough_blocks(max_rows=64, max_model_len=1000, block_size=16) == 1 + 64 * 16
    assert enough_blocks(max_rows=64, max_model_len=100_000, block_size=16) == 1 + 2 * 6250
    assert enough_blocks(max_rows=64, max_model_len=100, block_size=16) == 1 + 64 * 7
    assert enough_blocks(max_rows=1, max_model_len=100_000, block_size=16) == 1 + 6250
    huge = size_cache(CacheOptions(), 2**60, 16, 16, 1000, asked=True)
    assert (huge.num_blocks + 1) * 16 < 2**31


def test_buckets_bound_the_limits() -> None:
    buckets: dict[str, Any] = {
        "shapes": ShapePolicy.BUCKETED,
        "token_buckets": (8, 64, 256),
        "span_buckets": (1, 8),
        "span_mix": SpanMix.SINGLES_APART,
    }
    executor, report = build(**buckets)
    assert (executor.limits.max_rows, executor.limits.max_tokens) == (8, 256)
    assert len(report.notes) == 2 and "largest bucket" in report.notes[0]
    small, quiet = build(scheduler={"max_num_seqs": 5, "max_num_batched_tokens": 60}, **buckets)
    assert (small.limits.max_rows, small.limits.max_tokens) == (5, 60)
    assert quiet.notes == []


@pytest.mark.parametrize("graphs", [True, False])
def test_graphs_that_cannot_be_had_are_noted(graphs: bool) -> None:
    executor, report = build(graph_scope=GraphScope.STEP, graphs=graphs)
    assert len(report.notes) == 1 and report.notes[0].startswith("steps run eagerly: ")
    assert ("switched off" in report.notes[0]) is not graphs
    assert report.num_graphs == 0 and executor.graphs.captured == ()


@pytest.mark.parametrize("mix", list(SpanMix))
@pytest.mark.parametrize(("rows", "tokens", "length"), [(4, 100, 1000), (4, 100, 30), (64, 16, 50), (3, 9, 2)])
def test_the_largest_plan_stays_within_its_limits(mix: SpanMix, rows: int, tokens: int, length: int) -> None:
    limits = Limits(max_rows=rows, max_tokens=tokens, max_model_len=length, block_size=16, num_blocks=2, vocab_size=9)
    plan = largest_plan(limits, Capabilities(span_mix=mix, max_long_spans=2))
    assert plan.num_spans <= rows and plan.num_tokens <= tokens
    assert plan.span_lengths.min() >= 1 and plan.span_lengths.max() <= length
    if mix is SpanMix.ANY:
        assert plan.num_tokens == min(tokens, rows * length)
    else:
        assert plan.num_spans <= 2 and plan.num_tokens == min(tokens, 2 * length)


def test_decode_sizes() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 3]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert decode_sizes(300)[-5:] == [248, 256, 272, 288, 300]
    assert decode_sizes(4096)[-1] == 512


def test_split_covers_every_position_once() -> None:
    plan = StepPlan(
        step=7,
        span_rows=np.array([3, 1, 2], np.int32),
        span_starts=np.array([0, 5, 9], np.int32),
        span_lengths=np.array([5, 1, 4], np.int32),
        span_samples=np.array([True, False, True]),
    )
    for size in range(1, 11):
        pieces = split(plan, size)
        assert all(0 < piece.num_tokens <= size and piece.step == 7 for piece in pieces)
        covered = [
            (row, start + i)
            for piece in pieces
            for row, start, length in zip(piece.span_rows, piece.span_starts, piece.span_lengths, strict=True)
            for i in range(length)
        ]
        assert covered == [(3, i) for i in range(5)] + [(1, 5)] + [(2, 9 + i) for i in range(4)]
        assert [row for piece in pieces for row in piece.span_rows[piece.span_samples]] == [3, 2]
