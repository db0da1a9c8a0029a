"""The whole engine on the stand-in that STAND_IN names; the tests of each static backend run this file.

It is run in a process of its own because PyTorch gives its spare backend a name once a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, installed

from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.errors import OutOfMemory
from isthmus.plan import StepPlan
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import GREEDY, Arrangement, Engine, Outcome
from isthmus.testing.tiny_model import write_tiny_model
from isthmus.testing.toy_model import VOCAB_SIZE
from isthmus_static.programs import Programs

BACKEND = os.environ["STAND_IN"]
BLOCKS, BLOCK_SIZE = {"gaudi": ("8,24", 16)}.get(BACKEND, ("4", None))
FEW = {"token_buckets": "64", "span_buckets": "1,4", "block_buckets": BLOCKS}
TIGHT = Arrangement(rows=4, tokens=64, cache_tokens=256, prefix_caching=True, block_size=BLOCK_SIZE)
"""Prompts come in pieces, and not every running row has room in the cache."""
ALONE = Arrangement(rows=1, overlap=False, graphs=False)
LENGTHS = (1, 2, 17, 50, 100, 33, 16, 70, 128, 100)


@pytest.fixture(scope="module")
def device() -> Iterator[DeviceUnderTest]:
    opened = DeviceUnderTest.open(BACKEND, FEW)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def fake(device: DeviceUnderTest) -> FakeDevice:
    found = installed()
    assert found is not None and found.name == {"gaudi": "hpu"}.get(BACKEND, BACKEND)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The last one begins as the fifth does."""
    rng = np.random.default_rng(17)
    made = [rng.integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS]
    return [*made[:-1], [*made[4][:96], *made[-1][96:]]]


@pytest.fixture(scope="module")
def reference(model: str) -> Engine:
    return Engine(ReferenceBackend(), model, ALONE)


@pytest.fixture(scope="module")
def expected(reference: Engine, prompts: list[list[int]]) -> Outcome:
    return reference.run(prompts, one_at_a_time=True)


@pytest.fixture(scope="module")
def engine(device: DeviceUnderTest, model: str) -> Iterator[Engine]:
    running = Engine(device.backend, model, TIGHT)
    yield running
    running.close()


def drawn(index: int) -> RowSampling:
    return RowSampling(max_tokens=12, temperature=0.9, top_k=(0, 20)[index % 2], top_p=0.95, seed=index + 1)


def programs(engine: Engine) -> Programs:
    graphs = engine.executor._backend.graphs
    assert isinstance(graphs, Programs)
    return graphs


def test_there_is_a_graph_for_each_shape_before_any_request(engine: Engine, fake: FakeDevice) -> None:
    shapes = engine.executor._padding.shapes()
    assert [item.shape for item in engine.executor.graphs.captured] == sorted(shapes)
    if BACKEND == "gaudi":
        # Four rows of twelve blocks at most together, and a longer span's own row twelve.
        assert {shape.blocks for shape in shapes if shape.single} == {8, 24, 48}
        assert {shape.blocks for shape in shapes if not shape.single} == {8, 12}
    else:
        assert len(shapes) == 6, shapes
    assert fake.counters().graphs_compiled == programs(engine).compiles


def test_tokens_are_the_references_in_pieces_and_with_shared_prefixes(
    engine: Engine, prompts: list[list[int]], expected: Outcome
) -> None:
    assert engine.run(prompts).tokens == expected.tokens
    assert engine.run(prompts).tokens == expected.tokens
    assert engine.stats.prefix_hits > 0


def test_a_preempted_request_has_the_references_tokens(engine: Engine, reference: Engine) -> None:
    """So many short answers come first that the scheduler takes the next ones to be short as well."""
    engine.run([[7]] * 40, RowSampling(max_tokens=1))
    before, longer = engine.stats.preemptions, RowSampling(max_tokens=40)
    prompts = [[50 + index, *range(7, 46)] for index in range(4)]
    assert engine.run(prompts, longer).tokens == reference.run(prompts, longer).tokens
    assert engine.stats.preemptions > before


def test_drawn_tokens_are_the_references(engine: Engine, reference: Engine, prompts: list[list[int]]) -> None:
    assert engine.run(prompts, drawn).tokens == reference.run(prompts, drawn).tokens


def test_requests_that_end_early_leave_the_others_alone(
    engine: Engine, prompts: list[list[int]], expected: Outcome
) -> None:
    found = engine.run(prompts, abort=lambda index: index % 3 == 1)
    assert {index: found.tokens[index] for index in expected.tokens if index % 3 != 1} == {
        index: tokens for index, tokens in expected.tokens.items() if index % 3 != 1
    }


@pytest.mark.parametrize("sampling", [GREEDY, drawn], ids=["greedy", "drawn"])
def test_a_step_is_graphs_and_one_copy_down(
    engine: Engine, fake: FakeDevice, prompts: list[list[int]], sampling: RowSampling
) -> None:
    """Nothing runs eagerly: a row's start, the forward and the sampling are each one graph."""
    engine.run(prompts[:4], sampling)
    fake.reset_counters()
    with sampling_steps(engine) as submitted:
        engine.run(prompts, sampling)
    counted = fake.counters()
    # torch_tpu has no copy to the host that a later step cannot overtake: what is fetched is copied there first.
    copies = sum(submitted) if fake.name == "tpu" else 0
    assert set(counted.eager_ops) <= {"aten::clone", "aten::copy_"}, counted.eager_ops
    assert sum(counted.eager_ops.values()) == copies
    assert counted.graphs_compiled == 0 and counted.synchronizations == 0
    # A step that only computes a piece of a prompt samples nothing and brings nothing back.
    assert counted.device_to_host == sum(submitted) > 0


@contextmanager
def sampling_steps(engine: Engine) -> Iterator[list[bool]]:
    """Of each step submitted meanwhile, whether it samples."""
    submitted: list[bool] = []
    submit = engine.executor.submit

    def noted(plan: StepPlan) -> None:
        submitted.append(bool(plan.span_samples.any()))
        submit(plan)

    engine.executor.submit = noted
    try:
        yield submitted
    finally:
        del engine.executor.submit


def test_the_cache_stays_where_it_is(engine: Engine, prompts: list[list[int]]) -> None:
    def places() -> list[int]:
        caches = engine.executor._caches
        return [store.data_ptr() for cache in caches for store in (cache.keys, cache.values)]

    before = places()
    kept = engine.executor._caches[0].keys.clone()
    engine.run(prompts)
    assert places() == before
    assert not torch.equal(engine.executor._caches[0].keys.cpu(), kept.cpu())


def test_random_traffic_compiles_nothing(engine: Engine, reference: Engine) -> None:
    rng = np.random.default_rng(3)
    programs(engine).ready()
    for _ in range(4):
        prompts = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 140)).tolist() for _ in range(rng.integers(1, 12))]
        hot = rng.random(len(prompts)) < 0.5

        def sampling(index: int, hot: np.ndarray = hot) -> RowSampling:
            return drawn(index) if hot[index] else GREEDY

        assert engine.run(prompts, sampling).tokens == reference.run(prompts, sampling).tokens
    assert engine.stats.late_compiles == 0


def test_an_allocation_that_fails_in_a_step_costs_no_request(
    engine: Engine, fake: FakeDevice, prompts: list[list[int]], expected: Outcome
) -> None:
    """A long step runs again in halves."""
    fake.fail_next_allocation_over(600_000)
    assert engine.run(prompts).tokens == expected.tokens
    with pytest.raises(torch.OutOfMemoryError):  # it has come to pass: this one is told of a new failure
        fake.fail_next_allocation_over(0)
        torch.empty(1, device=fake.name)
    assert engine.stats.late_compiles == 0


def test_an_allocation_that_fails_for_one_token_ends_the_step_and_not_the_engine(
    engine: Engine, fake: FakeDevice, prompts: list[list[int]], expected: Outcome
) -> None:
    engine.core.add(AddRequest(request_id=99, prompt=pack_tokens([5]), sampling=GREEDY))
    fake.fail_next_allocation_over(0)
    errors = [item.error for _ in range(20) for item in engine.core.step() if item.error]
    assert len(errors) == 1 and "memory" in errors[0], errors
    assert engine.run(prompts).tokens == expected.tokens


def test_logprobs_and_other_parameters_go_through_the_host(
    engine: Engine, reference: Engine, prompts: list[list[int]]
) -> None:
    def sampling(index: int) -> RowSampling:
        return RowSampling(max_tokens=8, temperature=0.7, seed=index, presence_penalty=0.5, num_logprobs=2)

    found, wanted = engine.run(prompts[:4], sampling), reference.run(prompts[:4], sampling)
    assert found.tokens == wanted.tokens


def test_a_cache_that_does_not_fit_is_one_line(device: DeviceUnderTest, fake: FakeDevice, model: str) -> None:
    """Last here: a device has one engine at a time."""
    total = fake.total_memory
    fake.total_memory = fake.allocated_bytes + 32 * 2**20
    try:
        with pytest.raises(OutOfMemory) as raised:
            Engine(device.backend, model, Arrangement(rows=4, tokens=64, cache_tokens=1_000_000))
    finally:
        fake.total_memory = total
    assert "KV cache" in str(raised.value)
    assert "\n" not in str(raised.value)
