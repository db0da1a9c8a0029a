"""Scheduler, cache, engine loop and executor together: the same tokens under every arrangement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from isthmus.cache import BlockManager
from isthmus.contract import AttentionSpec, GraphScope, Limits, ShapePolicy, SpanMix
from isthmus.engine.core import EngineCore
from isthmus.engine.messages import AddRequest, FinishReason, Logprobs, pack_tokens
from isthmus.executor import Executor
from isthmus.model.source import ModelSource
from isthmus.model.spec import LayerSpec, ModelSpec, RopeSpec
from isthmus.model.weights import load_decoder
from isthmus.reference import REFERENCE_CAPABILITIES, ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits

MAX_LEN, SIZE = 96, 4
ATTENTION = AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=8**-0.5)
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden=32,
    inner=48,
    layers=(LayerSpec(attention=ATTENTION), LayerSpec(attention=dataclasses.replace(ATTENTION, window=12))),
    ropes=(RopeSpec(rotary_dim=8),),
    max_position=MAX_LEN,
    norm_epsilon=1e-5,
)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    rows: int = 64
    tokens: int = 512
    num_blocks: int = 1000
    prefix_caching: bool = False
    in_flight: int = 1
    bucketed: bool = False
    span_mix: SpanMix = SpanMix.ANY
    captured: bool = False
    """Every step is a replay; one that is not fails."""


@dataclasses.dataclass
class Replay:
    step: Callable[[], Any]

    def replay(self, num_tokens: int) -> Any:
        return self.step()


class Closures:
    """Captures a step by keeping it."""

    def capture(self, step: Callable[[], Any], num_tokens: int) -> Replay:
        return Replay(step)


class NeverEager:
    def forward(self, *args: Any) -> Any:
        raise AssertionError("a step ran without its graph")

    logits = forward


@dataclasses.dataclass
class Outcome:
    tokens: dict[int, list[int]]
    prompt_logprobs: dict[int, list[Logprobs | None]]
    preemptions: int
    prefix_hits: int


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(prompts: list[list[int]], samplings: list[RowSampling], how: Arrangement) -> Outcome:
    capabilities = dataclasses.replace(REFERENCE_CAPABILITIES, max_steps_in_flight=how.in_flight, span_mix=how.span_mix)
    if how.bucketed:
        capabilities = dataclasses.replace(
            capabilities,
            shapes=ShapePolicy.BUCKETED,
            token_buckets=(16, 64),
            span_buckets=(1, 4, 16),
            block_buckets=(2, 4),
            max_long_spans=3,
            graph_scope=GraphScope.FORWARD if how.captured else GraphScope.NONE,
        )
    backend = ReferenceBackend(
        capabilities=capabilities, asynchronous=how.in_flight > 1, graphs=Closures() if how.captured else None
    )
    source = ModelSource(name="tiny", path=Path("tiny"), kind="safetensors")
    decoder = load_decoder(source, SPEC, backend, "float32", MAX_LEN, random_weights=True, progress=False)
    limits = Limits(
        max_rows=how.rows,
        max_tokens=how.tokens,
        max_model_len=MAX_LEN,
        block_size=SIZE,
        num_blocks=how.num_blocks,
        vocab_size=SPEC.vocab_size,
    )
    caches = backend.attention.allocate([layer.attention for layer in SPEC.layers], limits, "float32")
    executor = Executor(backend, decoder, limits, caches, max_steps_in_flight=how.in_flight)
    if how.captured:
        assert executor.capture() == ()
        executor._model = NeverEager()  # type: ignore[misc]
    scheduler_limits = SchedulerLimits(
        max_num_seqs=how.rows,
        max_num_batched_tokens=how.tokens,
        max_model_len=MAX_LEN,
        steps_in_flight=how.in_flight,
        span_mix=how.span_mix,
        max_long_spans=capabilities.max_long_spans,
    )
    blocks = BlockManager(how.num_blocks, SIZE, prefix_caching=how.prefix_caching, seed=b"test")
    core = EngineCore(Scheduler(scheduler_limits, blocks), executor)
    outcome = Outcome({}, {}, 0, 0)
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        core.add(AddRequest(request_id=index, prompt=pack_tokens(prompt), sampling=sampling))
        outcome.tokens[index] = []
        outcome.prompt_logprobs[index] = []
    while core.has_work:
        for item in core.step():
            outcome.tokens[item.request_id] += item.tokens
            outcome.prompt_logprobs[item.request_id] += item.prompt_logprobs
            assert item.finish_reason in (None, FinishReason.LENGTH), item.error
    stats = core.stats()
    outcome.preemptions, outcome.prefix_hits = stats.preemptions, stats.prefix_hits
    core.close()
    backend.close()
    return outcome


def prompts() -> list[list[int]]:
    """64 of them, half on one of two shared prefixes."""
    rng = np.random.default_rng(0)
    shared = [rng.integers(0, SPEC.vocab_size, length).tolist() for length in (24, 13)]
    found = []
    for i in range(64):
        own = rng.integers(0, SPEC.vocab_size, 1 + (7 * i) % 19).tolist()
        found.append(shared[i // 2 % 2] + own if i % 2 else own)
    return found


SAMPLINGS = [
    RowSampling(max_tokens=1),
    RowSampling(max_tokens=1, temperature=1.2, seed=5),
    RowSampling(max_tokens=1, temperature=0.9, seed=6, top_p=0.8, repetition_penalty=1.3),
    RowSampling(max_tokens=1, presence_penalty=1.0, frequency_penalty=0.5),
]


def num_tokens(index: int) -> int:
    """Short outputs first: what the scheduler learns of them makes it admit too much afterwards."""
    return 2 if index < 32 else 20


def samplings() -> list[RowSampling]:
    return [msgspec.structs.replace(SAMPLINGS[i // 2 % 4], max_tokens=num_tokens(i)) for i in range(64)]


@pytest.fixture(scope="module")
def alone() -> dict[int, list[int]]:
    """Each request in an engine of one row."""
    outcome = run(prompts(), samplings(), Arrangement(rows=1))
    assert len({tuple(tokens) for tokens in outcome.tokens.values()}) > 50, "a test that any output would pass"
    assert all(len(tokens) == num_tokens(index) for index, tokens in outcome.tokens.items())
    return outcome.tokens


ARRANGEMENTS = {
    "together": Arrangement(),
    "overlapped": Arrangement(in_flight=2),
    "three in flight": Arrangement(in_flight=3, tokens=100),
    "chunked": Arrangement(tokens=24, rows=16),
    "chunked and overlapped": Arrangement(tokens=24, rows=16, in_flight=2),
    "prefix cache": Arrangement(prefix_caching=True, rows=16),
    "prefix cache and overlapped": Arrangement(prefix_caching=True, in_flight=2, tokens=64),
    "preempted": Arrangement(num_blocks=40, rows=12),
    "preempted and overlapped": Arrangement(num_blocks=40, rows=12, in_flight=2, tokens=48),
    "everything": Arrangement(num_blocks=40, rows=12, in_flight=2, tokens=24, prefix_caching=True),
    "buckets": Arrangement(bucketed=True, tokens=64, rows=16, in_flight=2),
    "singles apart": Arrangement(span_mix=SpanMix.SINGLES_APART, rows=16, tokens=64),
    "singles apart, in buckets": Arrangement(
        span_mix=SpanMix.SINGLES_APART, bucketed=True, rows=16, tokens=64, in_flight=2, prefix_caching=True
    ),
    "captured buckets": Arrangement(bucketed=True, captured=True, rows=16, tokens=64, in_flight=2),
    "captured buckets, singles apart": Arrangement(
        span_mix=SpanMix.SINGLES_APART, bucketed=True, captured=True, rows=12, tokens=64, num_blocks=40
    ),
}


@pytest.mark.parametrize("how", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_tokens_do_not_depend_on_the_arrangement(alone: dict[int, list[int]], how: Arrangement) -> None:
    outcome = run(prompts(), samplings(), how)
    assert outcome.tokens == alone
    assert (outcome.prefix_hits > 0) is how.prefix_caching
    assert (outcome.preemptions > 0) is (how.num_blocks < 100)


def test_prompt_logprobs_do_not_depend_on_the_arrangement() -> None:
    asked = [RowSampling(max_tokens=3, num_prompt_logprobs=2 if i % 3 == 0 else -1) for i in range(12)]
    chosen = prompts()[:12]
    whole = run(chosen, asked, Arrangement(rows=1))
    other = run(chosen, asked, Arrangement(rows=5, tokens=10, in_flight=2, prefix_caching=True, num_blocks=60))
    assert whole.tokens == other.tokens
    for index, prompt in enumerate(chosen):
        one, two = whole.prompt_logprobs[index], other.prompt_logprobs[index]
        if index % 3:
            assert one == two == []
            continue
        for token, a, b in zip(prompt, one, two, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.token, a.rank, [t for t, _ in a.top]) == (token, b.rank, [t for t, _ in b.top])
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
