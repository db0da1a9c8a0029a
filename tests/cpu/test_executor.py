"""Plans run by the executor over reference parts and a tiny decoder with random weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from isthmus.contract import (
    AttentionSpec,
    Capabilities,
    Limits,
    ShapePolicy,
    StepInputs,
)
from isthmus.errors import OutOfMemory
from isthmus.executor import Executor
from isthmus.executor.executor import StepModel
from isthmus.executor.shapes import StepShape
from isthmus.model.source import ModelSource
from isthmus.model.spec import LayerSpec, ModelSpec, RopeSpec
from isthmus.model.weights import load_decoder
from isthmus.plan import RowStart, StepPlan, StepResult
from isthmus.reference import REFERENCE_CAPABILITIES, ReferenceBackend
from isthmus.sampling_params import RowSampling

T = TypeVar("T")
MAX_LEN, SIZE, ROWS, TOKENS = 96, 4, 64, 512

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
SOURCE = ModelSource(name="tiny", path=Path("tiny"), kind="safetensors")
LIMITS = Limits(
    max_rows=ROWS,
    max_tokens=TOKENS,
    max_model_len=MAX_LEN,
    block_size=SIZE,
    num_blocks=1 + ROWS * MAX_LEN // SIZE,
    vocab_size=SPEC.vocab_size,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def capabilities(**changes: Any) -> Capabilities:
    return dataclasses.replace(REFERENCE_CAPABILITIES, **changes)


def make_executor(
    backend: ReferenceBackend | None = None,
    *,
    in_flight: int = 1,
    wrap: Callable[[StepModel], StepModel] = lambda model: model,
) -> Executor:
    backend = backend or ReferenceBackend()
    decoder = load_decoder(SOURCE, SPEC, backend, "float32", MAX_LEN, random_weights=True, progress=False)
    caches = backend.attention.allocate([layer.attention for layer in SPEC.layers], LIMITS, "float32")
    return Executor(backend, wrap(decoder), LIMITS, caches, max_steps_in_flight=in_flight)


class Watched:
    """A model that notes the shape of each forward, and raises in those of given numbers or above ``room`` tokens."""

    def __init__(self, model: StepModel, bad: dict[int, Exception] | None = None, room: int = TOKENS) -> None:
        self.model, self.bad, self.room, self.calls = model, bad or {}, room, 0
        self.shapes: list[StepShape] = []
        self.hidden = torch.zeros(0)

    def forward(self, inputs: StepInputs, caches: Sequence[Any], wanted: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        if self.calls - 1 in self.bad:
            raise self.bad[self.calls - 1]
        if inputs.num_tokens > self.room:
            raise torch.OutOfMemoryError(f"{inputs.num_tokens} tokens are too many")
        self.shapes.append(StepShape(inputs.num_tokens, inputs.num_spans, inputs.num_samples))
        self.hidden = self.model.forward(inputs, caches)
        if wanted is None:
            return self.hidden
        rows = self.model.forward(inputs, caches, wanted)
        torch.testing.assert_close(rows, self.hidden[wanted], atol=1e-5, rtol=1e-5)
        return rows

    def logits(self, hidden: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return self.model.logits(hidden, index)


@dataclass
class Sequence_:
    row: int
    prompt: list[int]
    sampling: RowSampling = field(default_factory=lambda: RowSampling(max_tokens=1))
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    length: int = 0  # tokens known, by the device at least
    started: bool = False
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.length = len(self.prompt)


class Driver:
    """The least of a scheduler: every sequence's next tokens in each step, in chunks, with placeholders."""

    def __init__(self, executor: Executor, sequences: list[Sequence_], *, chunk: int = TOKENS) -> None:
        self.executor, self.sequences, self.chunk = executor, sequences, chunk
        self.next_block = 1 + max((block for s in sequences for block in s.blocks), default=0)
        self.steps = 0
        self.results: list[StepResult] = []

    def plan(self, num_tokens: int) -> StepPlan | None:
        starts, appends, spans, room = [], [], [], TOKENS
        for s in self.sequences:
            if s.length >= len(s.prompt) + num_tokens and s.computed >= s.length - 1:
                continue
            count = min(s.length - s.computed, self.chunk, room)
            if count == 0:
                continue
            room -= count
            old = 0 if not s.started else len(s.blocks)
            while len(s.blocks) * SIZE < s.computed + count:
                s.blocks.append(self.next_block)
                self.next_block += 1
            appends += [(s.row, i, s.blocks[i]) for i in range(old, len(s.blocks))]
            if not s.started:
                tokens = np.array(s.prompt, np.int32)
                starts.append(RowStart(row=s.row, tokens=tokens, num_prompt_tokens=len(s.prompt), sampling=s.sampling))
                s.started = True
            samples = s.computed + count == s.length
            spans.append((s.row, s.computed, count, samples))
            s.computed += count
            s.length += samples
        if not spans:
            return None
        columns = np.array(appends, np.int32).reshape(-1, 3).T
        rows, begins, counts, samples_ = zip(*spans, strict=True)
        self.steps += 1
        return StepPlan(
            step=self.steps - 1,
            starts=tuple(starts),
            block_rows=columns[0],
            block_indices=columns[1],
            block_ids=columns[2],
            span_rows=np.array(rows, np.int32),
            span_starts=np.array(begins, np.int32),
            span_lengths=np.array(counts, np.int32),
            span_samples=np.array(samples_, np.bool_),
        )

    def run(self, num_tokens: int) -> list[list[int]]:
        by_row = {s.row: s for s in self.sequences}
        submitted = 0
        while True:
            while submitted < self.executor.max_steps_in_flight:
                plan = self.plan(num_tokens)
                if plan is None:
                    break
                self.executor.submit(plan)
                submitted += 1
            if submitted == 0:
                return [s.tokens for s in self.sequences]
            result = self.executor.collect()
            assert result.step == len(self.results)
            self.results.append(result)
            submitted -= 1
            for row, token in zip(result.rows.tolist(), result.tokens[:, 0].tolist(), strict=True):
                by_row[row].tokens.append(token)


def keep(models: list[Watched], room: int = TOKENS) -> Callable[[StepModel], StepModel]:
    """Wraps the model, and puts the wrapper where the test sees it."""

    def wrap(model: StepModel) -> StepModel:
        models.append(Watched(model, room=room))
        return models[-1]

    return wrap


def prompts(count: int = ROWS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, SPEC.vocab_size, 1 + (7 * i) % 23).tolist() for i in range(count)]


def sequences(count: int = ROWS, sampling: RowSampling | None = None) -> list[Sequence_]:
    sampling = sampling or RowSampling(max_tokens=1)
    return [Sequence_(row=i, prompt=prompt, sampling=sampling) for i, prompt in enumerate(prompts(count))]


NUM_TOKENS = 12


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each prompt by itself, unchunked, one step in flight."""
    found = []
    for sequence in sequences():
        found += Driver(make_executor(), [sequence]).run(NUM_TOKENS)
    assert len({tuple(tokens) for tokens in found}) > 50, "a test that any output would pass"
    return found


@pytest.mark.parametrize("chunk", [TOKENS, 5, 1])
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_greedy_is_the_same_in_any_company(
    alone: list[list[int]], chunk: int, in_flight: int, asynchronous: bool
) -> None:
    backend = ReferenceBackend(asynchronous=asynchronous)
    executor = make_executor(backend, in_flight=in_flight)
    assert Driver(executor, sequences(), chunk=chunk).run(NUM_TOKENS) == alone
    executor.close()
    backend.close()


def test_padded_buckets_change_nothing(alone: list[list[int]]) -> None:
    models: list[Watched] = []
    buckets = capabilities(shapes=ShapePolicy.BUCKETED, token_buckets=(8, 32, 128, 4096), span_buckets=(1, 16, 40))
    executor = make_executor(ReferenceBackend(capabilities=buckets), wrap=keep(models))
    assert Driver(executor, sequences(37), chunk=3).run(NUM_TOKENS) == alone[:37]
    tokens, spans, samples = ({shape[i] for shape in models[0].shapes} for i in range(3))
    assert tokens <= {8, 32, 128, TOKENS} and spans <= {1, 16, 40, ROWS} and samples <= {0, 1, 16, 40, ROWS}
    assert 40 in spans and 128 in tokens


def test_rows_may_share_blocks(alone: list[list[int]]) -> None:
    """A second sequence starts after blocks that a first has filled."""
    executor = make_executor()
    prompt = prompts(4)[3]
    assert len(prompt) > 2 * SIZE
    first = Sequence_(row=5, prompt=prompt)
    assert Driver(executor, [first]).run(NUM_TOKENS) == [alone[3]]
    second = Sequence_(row=9, prompt=prompt, blocks=first.blocks[:2], computed=2 * SIZE)
    driver = Driver(executor, [second])
    driver.next_block = max(first.blocks) + 1
    assert driver.run(NUM_TOKENS) == [alone[3]]
    assert driver.results[0].tokens.shape == (1, 1) and driver.results[0].logprobs is None


def test_rows_are_used_again(alone: list[list[int]]) -> None:
    executor = make_executor()
    for index in (3, 0, 17):
        assert Driver(executor, [Sequence_(row=2, prompt=prompts()[index])]).run(NUM_TOKENS) == [alone[index]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_step_surfaces_alone(asynchronous: bool) -> None:
    backend = ReferenceBackend(asynchronous=asynchronous)
    executor = make_executor(backend, in_flight=3, wrap=lambda model: Watched(model, {1: ValueError("bad kernel")}))
    driver = Driver(executor, sequences(3))
    plans = [driver.plan(9) for _ in range(3)]
    for plan in plans:
        assert plan is not None
        executor.submit(plan)
    assert executor.collect().step == 0
    with pytest.raises(ValueError, match="bad kernel"):
        executor.collect()
    last = executor.collect()
    assert last.step == 2 and last.tokens.shape == (3, 1)
    backend.close()


@pytest.mark.parametrize("room", [64, 7, 1])
def test_a_step_too_large_for_memory_runs_in_pieces(
    alone: list[list[int]], room: int, caplog: pytest.LogCaptureFixture
) -> None:
    models: list[Watched] = []
    caplog.set_level(logging.ERROR)  # the warnings are many here
    logprobs = RowSampling(max_tokens=1, num_logprobs=2, num_prompt_logprobs=1)
    whole = Driver(make_executor(), sequences(40, logprobs))
    pieces = Driver(make_executor(wrap=keep(models, room=room)), sequences(40, logprobs))
    assert whole.run(3) == [tokens[:3] for tokens in alone[:40]]
    assert pieces.run(3) == [tokens[:3] for tokens in alone[:40]]
    assert max(shape.tokens for shape in models[0].shapes) <= room
    for one, other in zip(whole.results, pieces.results, strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        np.testing.assert_allclose(one.logprobs.top_logprobs, other.logprobs.top_logprobs, atol=1e-4)
        assert one.prompt_logprobs.keys() == other.prompt_logprobs.keys()
        for row in one.prompt_logprobs:
            np.testing.assert_allclose(one.prompt_logprobs[row].chosen, other.prompt_logprobs[row].chosen, atol=1e-4)


def test_a_step_of_one_token_that_does_not_fit_fails_alone() -> None:
    executor = make_executor(wrap=lambda model: Watched(model, {0: torch.OutOfMemoryError("full")}))
    driver = Driver(executor, [Sequence_(row=0, prompt=[5])])
    first, second = driver.plan(9), driver.plan(9)
    assert first is not None and second is not None
    with pytest.raises(OutOfMemory, match="single token"):
        executor.run(first)
    assert executor.run(second).step == 1


def all_logits(tokens: list[int]) -> torch.Tensor:
    """float32 [len(tokens), vocab] of one unchunked forward."""
    models: list[Watched] = []
    Driver(make_executor(wrap=keep(models)), [Sequence_(row=0, prompt=tokens)]).run(1)
    with torch.inference_mode():
        return models[0].logits(models[0].hidden, None)


@pytest.mark.parametrize("chunk", [TOKENS, 5])
@pytest.mark.parametrize("piece", [256, 3])
def test_prompt_logprobs(chunk: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.executor.prompt_logprobs.PIECE", piece)
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, SPEC.vocab_size, 17).tolist()
    asked = Sequence_(row=4, prompt=prompt, sampling=RowSampling(max_tokens=1, num_prompt_logprobs=3))
    others = [Sequence_(row=1, prompt=prompt[:6]), Sequence_(row=7, prompt=[3])]
    driver = Driver(make_executor(), [others[0], asked, others[1]], chunk=chunk)
    driver.run(3)

    expected = torch.log_softmax(all_logits(prompt).double(), -1)[:-1]
    parts = [result.prompt_logprobs[4] for result in driver.results if result.prompt_logprobs]
    assert all(result.prompt_logprobs.keys() <= {4} for result in driver.results)
    chosen = np.concatenate([part.chosen for part in parts])
    ids = np.concatenate([part.top_ids for part in parts])
    ranks = np.concatenate([part.ranks for part in parts])
    following = torch.tensor(prompt[1:])[:, None]
    np.testing.assert_allclose(chosen, expected.gather(1, following)[:, 0], atol=1e-4)
    assert ids.tolist() == expected.topk(3).indices.tolist()
    assert ranks.tolist() == ((expected > expected.gather(1, following)).sum(-1) + 1).tolist()


def test_logprobs_are_as_many_as_the_most_demanding_row_asks_for() -> None:
    wants = [-1, 0, 4]
    rows = [
        Sequence_(row=i, prompt=prompt, sampling=RowSampling(max_tokens=1, num_logprobs=want))
        for i, (prompt, want) in enumerate(zip(prompts(3), wants, strict=True))
    ]
    driver = Driver(make_executor(), rows)
    driver.run(2)
    for result in driver.results:
        assert result.logprobs is not None
        assert result.logprobs.chosen.shape == (3,) and result.logprobs.top_ids.shape == (3, 4)


def test_a_step_that_samples_nothing_has_no_logits() -> None:
    class NoLogits(Watched):
        def logits(self, hidden: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
            raise AssertionError("not needed")

    executor = make_executor(wrap=NoLogits)
    plan = Driver(executor, [Sequence_(row=0, prompt=[1, 2, 3, 4])], chunk=2).plan(1)
    assert plan is not None
    result = executor.run(plan)
    assert result.tokens.shape == (0, 1) and len(result.rows) == len(result.invalid) == 0


def test_drawn_tokens_depend_on_seed_and_position_alone() -> None:
    """Batch 1 against batch 33, chunked or not, at high temperature."""
    drawn = RowSampling(max_tokens=1, temperature=1.5, seed=99)
    together = Driver(make_executor(in_flight=2), sequences(33, drawn), chunk=4).run(NUM_TOKENS)
    for index in (0, 5, 32):
        one = Sequence_(row=0, prompt=prompts()[index], sampling=drawn)
        assert Driver(make_executor(), [one]).run(NUM_TOKENS) == [together[index]]
