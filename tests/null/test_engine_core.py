"""The engine loop in one process, on the null executor: overlap, failures, aborts, progress."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from isthmus.cache import BlockManager
from isthmus.config import BackendOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.contract import Limits
from isthmus.engine.build import build_engine
from isthmus.engine.core import EngineCore
from isthmus.engine.local import LocalEngine
from isthmus.engine.messages import AddRequest, FinishReason, TokensOut, pack_tokens
from isthmus.errors import EngineDead, InvalidRequest, IsthmusError
from isthmus.plan import StepPlan, StepResult
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits
from isthmus.testing.null import NullBehaviour, NullExecutor
from isthmus.testing.toy_model import EOS_TOKEN

NAN, FAIL, FAIL_SUBMIT = 1, 2, 3
"""Prompt tokens that the device of these tests takes amiss."""

THOROUGH = NullBehaviour(thorough=True, nan_token=NAN, fail_token=FAIL, fail_submit_token=FAIL_SUBMIT, eos_every=24)


def make_core(
    depth: int = 2, *, num_blocks: int = 512, max_rows: int = 16, executor: NullExecutor | None = None
) -> EngineCore:
    limits = Limits(
        max_rows=max_rows, max_tokens=48, max_model_len=128, block_size=4, num_blocks=num_blocks, vocab_size=259
    )
    executor = executor or NullExecutor(limits, THOROUGH, max_steps_in_flight=depth)
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_seqs=limits.max_rows,
            max_num_batched_tokens=limits.max_tokens,
            max_model_len=limits.max_model_len,
            steps_in_flight=depth,
        ),
        BlockManager(limits.num_blocks, limits.block_size, prefix_caching=True),
    )
    return EngineCore(scheduler, executor)


def request(request_id: int, prompt: bytes, max_tokens: int = 24) -> AddRequest:
    sampling = RowSampling(max_tokens=max_tokens, stop_token_ids=(EOS_TOKEN,))
    return AddRequest(request_id=request_id, prompt=pack_tokens(list(prompt)), sampling=sampling)


def run(core: EngineCore, requests: list[AddRequest]) -> dict[int, list[TokensOut]]:
    brought: dict[int, list[TokensOut]] = {}
    for each in requests:
        core.add(each)
    while core.has_work:
        for item in core.step():
            brought.setdefault(item.request_id, []).append(item)
    return brought


def tokens(items: list[TokensOut]) -> list[int]:
    return [token for item in items for token in item.tokens]


def prompts(count: int, seed: int) -> list[bytes]:
    """Random ones, many of which begin alike."""
    draw = random.Random(seed)
    beginnings = [bytes(draw.choices(range(32, 127), k=draw.randint(1, 40))) for _ in range(4)]
    return [draw.choice(beginnings) + bytes(draw.choices(range(32, 127), k=draw.randint(1, 30))) for _ in range(count)]


def is_at_rest(core: EngineCore) -> bool:
    stats = core.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks + stats.num_cached_blocks == (
        stats.num_blocks
    )


@pytest.mark.parametrize("num_blocks", [512, 48], ids=["roomy", "preempting"])
def test_the_number_of_steps_in_flight_changes_nothing(num_blocks: int) -> None:
    requests = [request(i, prompt) for i, prompt in enumerate(prompts(40, seed=1))]
    alone = {each.request_id: tokens(run(make_core(1), [each])[each.request_id]) for each in requests}
    assert len({tuple(brought) for brought in alone.values()}) > 30
    for depth in (1, 2, 3):
        core = make_core(depth, num_blocks=num_blocks)
        brought = run(core, requests)
        assert {request_id: tokens(items) for request_id, items in brought.items()} == alone
        assert is_at_rest(core)
        assert (core.stats().preemptions > 0) == (num_blocks == 48)


def test_steps_are_kept_in_flight() -> None:
    """While one step is collected, the next is submitted already; with a depth of 1, it is not."""
    for depth, most in ((1, 1), (2, 2), (3, 3)):
        limits = Limits(max_rows=4, max_tokens=48, max_model_len=128, block_size=4, num_blocks=64, vocab_size=259)
        watch = _Watch(limits, THOROUGH, max_steps_in_flight=depth)
        run(make_core(depth, max_rows=4, num_blocks=64, executor=watch), [request(0, b"hello")])
        assert watch.most_in_flight == most


class _Watch(NullExecutor):
    in_flight = most_in_flight = 0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def collect(self) -> StepResult:
        self.in_flight -= 1
        return super().collect()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bad", [FAIL, FAIL_SUBMIT])
def test_a_failed_step_ends_its_own_requests_only(depth: int, bad: int) -> None:
    good = [request(i, prompt) for i, prompt in enumerate(prompts(6, seed=2))]
    alone = run(make_core(1), good)
    core = make_core(depth, max_rows=2)
    # Two rows: the failing request shares its steps with one other at most.
    brought = run(core, [*good[:3], request(100, bytes([50, bad, 51])), *good[3:]])
    failed = [request_id for request_id, items in brought.items() if items[-1].finish_reason == FinishReason.ERROR]
    assert 100 in failed and len(failed) <= 2
    assert "a failure that was asked for" in brought[100][-1].error and not tokens(brought[100])
    for each in good:
        if each.request_id not in failed:
            assert tokens(brought[each.request_id]) == tokens(alone[each.request_id])
            assert brought[each.request_id][-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert is_at_rest(core)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_failures_in_a_row_end_the_engine_and_others_do_not(depth: int) -> None:
    core = make_core(depth, max_rows=1)
    bad = bytes([FAIL, 50])
    for i in range(4):  # a failure, then a request that is served, again and again
        brought = run(core, [request(2 * i, bad), request(2 * i + 1, b"fine")])
        assert brought[2 * i][-1].finish_reason == FinishReason.ERROR
        assert brought[2 * i + 1][-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    with pytest.raises(EngineDead, match="failed 3 times in a row, last with: RuntimeError: a failure"):
        run(core, [request(100 + i, bad) for i in range(4)])


def test_a_row_with_a_nan_ends_that_request_only() -> None:
    good = [request(i, prompt) for i, prompt in enumerate(prompts(8, seed=3))]
    alone = run(make_core(1), good)
    core = make_core(2)
    brought = run(core, [*good[:4], request(100, bytes([60, NAN])), *good[4:]])
    [last] = brought.pop(100)
    assert last.finish_reason == FinishReason.ERROR and "not finite" in last.error
    assert {i: tokens(items) for i, items in brought.items()} == {i: tokens(items) for i, items in alone.items()}
    assert core.stats().invalid_rows == 1 and is_at_rest(core)


def test_aborts_at_any_step_leave_the_others_alone() -> None:
    requests = [request(i, prompt) for i, prompt in enumerate(prompts(30, seed=4))]
    alone = run(make_core(1), requests)
    draw = random.Random(5)
    core, brought, aborted = make_core(2, num_blocks=64), {}, set()
    for each in requests:
        core.add(each)
    while core.has_work:
        for item in core.step():
            assert item.request_id not in aborted
            brought.setdefault(item.request_id, []).extend(item.tokens)
        if draw.random() < 0.3:
            chosen = draw.choice(requests).request_id
            was_live = core.abort([chosen, 12345])
            assert was_live in ([], [chosen])
            aborted.update(was_live)
            assert core.abort([chosen]) == []
    assert aborted
    for each in requests:
        if each.request_id not in aborted:
            assert brought[each.request_id] == tokens(alone[each.request_id])
    assert is_at_rest(core)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (pack_tokens([1, 259]), "token id 259; this model's ids are 0 to 258"),
        (pack_tokens([-1, 5]), "token id -1"),
    ],
)
def test_prompts_that_no_device_could_embed_are_refused(prompt: bytes, says: str) -> None:
    core = make_core()
    with pytest.raises(InvalidRequest, match=says):
        core.add(AddRequest(request_id=0, prompt=prompt, sampling=RowSampling(max_tokens=1)))
    assert not core.has_work


def test_progress_is_told_apart_from_having_nothing_to_do() -> None:
    now = 0.0
    limits = Limits(max_rows=2, max_tokens=48, max_model_len=128, block_size=4, num_blocks=64, vocab_size=259)
    scheduler = Scheduler(
        SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=48, max_model_len=128),
        BlockManager(64, 4, prefix_caching=True),
    )
    core = EngineCore(scheduler, NullExecutor(limits, THOROUGH), max_steps_in_flight=1, clock=lambda: now)
    now = 10.0
    assert core.stats().last_progress_s == 10.0  # idle
    now = 20.0
    core.add(request(0, b"hello", max_tokens=3))
    now = 30.0
    assert core.stats().last_progress_s == 20.0  # work, and nothing computed since it came
    core.step()
    now = 40.0
    assert core.stats().last_progress_s == 30.0


def null_options(**changes: object) -> EngineOptions:
    return EngineOptions(
        model=ModelOptions(model="toy", max_model_len=128),
        scheduler=SchedulerOptions(max_waiting=5, max_num_seqs=3),
        backend=BackendOptions(device="null", options={"thorough": "1", **{k: str(v) for k, v in changes.items()}}),
    )


def test_a_local_engine_takes_more_requests_than_may_wait() -> None:
    requests = [request(i, prompt) for i, prompt in enumerate(prompts(40, seed=6))]
    expected = run(make_core(1), requests)
    engine = LocalEngine.start(null_options(eos_every=24))
    brought: dict[int, list[TokensOut]] = {}
    for item in engine.generate(iter(requests)):
        brought.setdefault(item.request_id, []).append(item)
    assert {i: tokens(items) for i, items in brought.items()} == {i: tokens(items) for i, items in expected.items()}
    engine.close()


def test_a_local_engine_is_at_rest_after_an_iterator_is_closed_or_a_request_is_bad() -> None:
    engine = LocalEngine.start(null_options())
    core = engine._core
    iterator: Iterator[TokensOut] = engine.generate(request(i, b"hello") for i in range(8))
    next(iterator)
    assert not is_at_rest(core)
    iterator.close()  # type: ignore[attr-defined]
    assert is_at_rest(core)
    with pytest.raises(InvalidRequest):
        list(engine.generate([request(10, b"fine"), request(11, b"x" * 500)]))
    assert is_at_rest(core)


def test_what_the_engine_settled_on_is_told() -> None:
    core, ready = build_engine(null_options(), progress=False)
    assert (ready.backend, ready.model_name, ready.vocab_size) == ("null", "toy", 259)
    assert (ready.max_model_len, ready.max_num_seqs, ready.max_waiting) == (128, 3, 5)
    assert ready.num_blocks == core.stats().num_blocks
    core.close()


def test_overlap_can_be_turned_off() -> None:
    for overlap, depth in ((True, 2), (False, 1)):
        options = EngineOptions(
            model=ModelOptions(model="toy"),
            scheduler=SchedulerOptions(overlap=overlap),
            backend=BackendOptions(device="null"),
        )
        core, _ = build_engine(options)
        core.add(request(0, b"hello"))
        core.step()
        assert len(core._in_flight) == depth - 1
        core.close()


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_waiting"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    options = EngineOptions(
        model=ModelOptions(model="toy"), scheduler=SchedulerOptions(**{name: 0}), backend=BackendOptions(device="null")
    )
    with pytest.raises(IsthmusError, match=f"{name} is 0; it must be more than 0"):
        build_engine(options)
