"""Plans replayed on an executor: in order, in flight, into rows and blocks that others have used.

Every backend has an executor, its own or the core's over its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from isthmus.contract import StepExecutor
from isthmus.plan import StepPlan, StepResult
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import Arrangement, Engine, small_blocks
from isthmus.testing.suite.steps import Span, Starting, plan_of
from isthmus.testing.tiny_model import write_tiny_model

pytestmark = [pytest.mark.mandatory]

SAMPLING = RowSampling(max_tokens=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("plans")))


@pytest.fixture
def new_executor(isthmus_device: DeviceUnderTest, model: str) -> Iterator[Callable[..., StepExecutor]]:
    made: list[Engine] = []

    def make(block_size: int | None = None) -> StepExecutor:
        how = Arrangement(rows=4, tokens=64, dtype=isthmus_device.capabilities.dtypes[0], block_size=block_size)
        made.append(Engine(isthmus_device.backend, isthmus_device.model or model, how))
        return made[-1].executor

    yield make
    for engine in made:
        engine.close()


def replay(executor: StepExecutor, plans: list[StepPlan], depth: int) -> list[StepResult]:
    """Submit with up to ``depth`` in flight; every result in order."""
    results: list[StepResult] = []
    in_flight = 0
    for plan in plans:
        if in_flight == depth:
            results.append(executor.collect())
            in_flight -= 1
        executor.submit(plan)
        in_flight += 1
    results += [executor.collect() for _ in range(in_flight)]
    assert [result.step for result in results] == [plan.step for plan in plans], "results are out of order"
    for result, plan in zip(results, plans, strict=True):
        assert result.rows.tolist() == plan.span_rows[plan.span_samples].tolist(), "results name other rows"
        assert result.tokens.shape == (len(result.rows), 1) and result.invalid.shape == (len(result.rows),)
        assert not result.invalid.any()
    return results


def lives(executor: StepExecutor, rows: list[int], length: int, steps: int, first_step: int = 0) -> list[StepPlan]:
    """Each of ``rows`` computes its prompt in a step of its own, then all decode together."""
    size = executor.limits.block_size
    blocks = -(-(length + steps) // size)
    plans: list[StepPlan] = []
    for place, row in enumerate(rows):
        prompt = np.random.default_rng(row).integers(0, 200, length).tolist()
        table = [1 + place * blocks + n for n in range(blocks)]
        starts = {row: Starting(prompt, table, sampling=SAMPLING)}
        plans.append(plan_of(first_step + len(plans), [Span(row, 0, length)], starts))
    for n in range(steps):
        plans.append(plan_of(first_step + len(plans), [Span(row, length + n, 1) for row in rows]))
    return plans


def tokens(results: list[StepResult], row: int) -> list[int]:
    return [int(result.tokens[place, 0]) for result in results for place in np.flatnonzero(result.rows == row).tolist()]


def test_steps_in_flight_read_tokens_that_the_host_never_saw(new_executor: Callable[[], StepExecutor]) -> None:
    executor = new_executor()
    plans = lives(executor, [0, 1, 2], 9, 10)
    one, several = (replay(executor, plans, depth) for depth in (1, executor.max_steps_in_flight))
    for row in (0, 1, 2):
        assert len(tokens(one, row)) == 11
        assert tokens(one, row) == tokens(several, row)


def test_a_sequence_neither_sees_its_row_nor_its_blocks_past(new_executor: Callable[[], StepExecutor]) -> None:
    executor = new_executor()
    alone = replay(executor, lives(executor, [3], 12, 6), executor.max_steps_in_flight)
    others = lives(executor, [0, 3], 30, 8)
    replay(executor, others, executor.max_steps_in_flight)
    again = replay(executor, lives(executor, [3], 12, 6), executor.max_steps_in_flight)
    assert tokens(alone, 3) == tokens(again, 3)


def test_a_prompt_in_pieces_is_the_whole_prompt(new_executor: Callable[[], StepExecutor]) -> None:
    executor = new_executor()
    prompt = np.random.default_rng(1).integers(0, 200, 40).tolist()
    size = executor.limits.block_size
    table = [1 + n for n in range(-(-48 // size))]
    start = {2: Starting(prompt, table, sampling=SAMPLING)}
    whole = replay(executor, [plan_of(0, [Span(2, 0, 40)], start)], 1)
    pieces = [(0, 7, False), (7, 1, False), (8, 30, False), (38, 2, True)]
    plans = [
        plan_of(n, [Span(2, begin, length, samples)], start if n == 0 else None)
        for n, (begin, length, samples) in enumerate(pieces)
    ]
    results = replay(executor, plans, executor.max_steps_in_flight)
    assert [len(result.rows) for result in results] == [0, 0, 0, 1]
    assert tokens(results, 2) == tokens(whole, 2)


def test_a_row_may_begin_behind_a_prefix_that_another_computed(
    new_executor: Callable[..., StepExecutor], isthmus_device: DeviceUnderTest
) -> None:
    executor = new_executor(small_blocks(isthmus_device.capabilities))
    size = executor.limits.block_size
    prefix = -(-16 // size) * size
    if prefix + 5 > 60:
        pytest.skip("undeclared: blocks of fewer than 64 tokens")
    prompt = np.random.default_rng(2).integers(0, 200, prefix + 5).tolist()
    blocks = [1 + n for n in range(-(-(prefix + 8) // size))]
    first = plan_of(0, [Span(0, 0, prefix + 5)], {0: Starting(prompt, blocks, sampling=SAMPLING)})
    shared = [*blocks[: prefix // size], 40, 41, 42, 43, 44]
    shared = shared[: len(blocks)]
    second = plan_of(1, [Span(1, prefix, 5)], {1: Starting(prompt, shared, sampling=SAMPLING)})
    results = replay(executor, [first, second], executor.max_steps_in_flight)
    assert tokens(results, 0) == tokens(results, 1)


def test_limits_are_those_of_the_options(
    new_executor: Callable[[], StepExecutor], isthmus_device: DeviceUnderTest
) -> None:
    executor = new_executor()
    assert executor.limits.max_rows <= 4 and executor.limits.max_tokens <= 64
    assert executor.limits.block_size == isthmus_device.capabilities.block_sizes[0]
    assert 1 <= executor.max_steps_in_flight <= isthmus_device.capabilities.max_steps_in_flight


def test_closing_with_steps_in_flight(new_executor: Callable[[], StepExecutor]) -> None:
    executor = new_executor()
    for plan in lives(executor, [0], 5, 4)[: executor.max_steps_in_flight]:
        executor.submit(plan)
    executor.close()
