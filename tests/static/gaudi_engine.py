"""The whole engine on the stand-in for Gaudi's device; tests/static/test_gaudi.py runs this file.

It is run in a process of its own because PyTorch gives its spare backend a name once a process.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, installed

from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.errors import BackendError, OutOfMemory
from isthmus.plan import StepPlan
from isthmus.plugins import open_backend
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import GREEDY, Arrangement, Engine, Outcome
from isthmus.testing.tiny_model import write_tiny_model
from isthmus.testing.toy_model import VOCAB_SIZE
from isthmus_gaudi.fp8 import Fp8Weight
from isthmus_static.backend import StaticBackend
from isthmus_static.programs import Programs

FEW = {"token_buckets": "64", "span_buckets": "1,4", "block_buckets": "8,24"}
TIGHT = Arrangement(rows=4, tokens=64, cache_tokens=256, prefix_caching=True, block_size=16)
"""Prompts come in pieces, and not every running row has room in the cache."""
ALONE = Arrangement(rows=1, overlap=False, graphs=False)
WIDTH = 512
LENGTHS = (1, 2, 17, 50, 100, 33, 16, 70, 128, 100)


@pytest.fixture(scope="module")
def device() -> Iterator[DeviceUnderTest]:
    opened = DeviceUnderTest.open("gaudi", FEW)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def fake(device: DeviceUnderTest) -> FakeDevice:
    found = installed()
    assert found is not None and found.name == "hpu"
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


def random_traffic(engine: Engine, reference: Engine, rounds: int) -> None:
    rng = np.random.default_rng(3)
    programs(engine).ready()
    for _ in range(rounds):
        prompts = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 140)).tolist() for _ in range(rng.integers(1, 12))]
        hot = rng.random(len(prompts)) < 0.5

        def sampling(index: int, hot: np.ndarray = hot) -> RowSampling:
            return drawn(index) if hot[index] else GREEDY

        assert engine.run(prompts, sampling).tokens == reference.run(prompts, sampling).tokens
    assert engine.stats.late_compiles == 0


def test_there_is_a_graph_for_each_shape_before_any_request(engine: Engine, fake: FakeDevice) -> None:
    shapes = engine.executor._padding.shapes()
    assert [item.shape for item in engine.executor.graphs.captured] == sorted(shapes)
    # Four rows of twelve blocks at most together, and a longer span's own row twelve.
    assert {shape.blocks for shape in shapes if shape.single} == {8, 24, 48}
    assert {shape.blocks for shape in shapes if not shape.single} == {8, 12}
    assert fake.counters().graphs_compiled == programs(engine).compiles


def test_tokens_are_the_references_in_pieces_and_with_shared_prefixes(
    engine: Engine, prompts: list[list[int]], expected: Outcome
) -> None:
    assert engine.run(prompts).tokens == expected.tokens
    assert engine.run(prompts).tokens == expected.tokens
    assert engine.stats.prefix_hits > 0


def test_a_preempted_request_has_the_references_tokens(
    engine: Engine, reference: Engine, prompts: list[list[int]]
) -> None:
    """So many short answers first that the scheduler takes the next ones to be short as well."""
    longer, before = RowSampling(max_tokens=40), engine.stats.preemptions
    short = [prompt for prompt in prompts if len(prompt) <= 50] * 2
    engine.run([[7]] * 40, RowSampling(max_tokens=1))
    assert engine.run(short, longer).tokens == reference.run(short, longer).tokens
    assert engine.stats.preemptions > before


def test_drawn_tokens_are_the_references(engine: Engine, reference: Engine, prompts: list[list[int]]) -> None:
    assert engine.run(prompts, drawn).tokens == reference.run(prompts, drawn).tokens


def test_requests_that_end_early_leave_the_others_alone(
    engine: Engine, prompts: list[list[int]], expected: Outcome
) -> None:
    found = engine.run(prompts, abort=lambda index: index % 3 == 1)
    stayed = [index for index in expected.tokens if index % 3 != 1]
    assert [found.tokens[index] for index in stayed] == [expected.tokens[index] for index in stayed]


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
    assert counted.eager_ops == {}
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
    kept = engine.executor._caches[0].keys.cpu()
    engine.run(prompts)
    assert places() == before
    assert not torch.equal(engine.executor._caches[0].keys.cpu(), kept)


def test_random_traffic_compiles_nothing(engine: Engine, reference: Engine) -> None:
    random_traffic(engine, reference, 4)


def test_logprobs_and_other_parameters_go_through_the_host(
    engine: Engine, reference: Engine, prompts: list[list[int]]
) -> None:
    def sampling(index: int) -> RowSampling:
        return RowSampling(max_tokens=8, temperature=0.7, seed=index, presence_penalty=0.5, num_logprobs=2)

    assert engine.run(prompts[:4], sampling).tokens == reference.run(prompts[:4], sampling).tokens


def test_an_allocation_that_fails_in_a_step_costs_no_request(
    engine: Engine, fake: FakeDevice, prompts: list[list[int]], expected: Outcome
) -> None:
    """A long step runs again in halves."""
    fake.fail_next_allocation_over(600_000)
    assert engine.run(prompts).tokens == expected.tokens
    with pytest.raises(torch.OutOfMemoryError):  # it has come to pass: this one is told of a new failure
        fake.fail_next_allocation_over(0)
        torch.empty(1, device="hpu")
    assert engine.stats.late_compiles == 0


def test_an_allocation_that_fails_for_one_token_ends_the_step_and_not_the_engine(
    engine: Engine, fake: FakeDevice, prompts: list[list[int]], expected: Outcome
) -> None:
    engine.core.add(AddRequest(request_id=99, prompt=pack_tokens([5]), sampling=GREEDY))
    fake.fail_next_allocation_over(0)
    errors = [item.error for _ in range(20) for item in engine.core.step() if item.error]
    assert len(errors) == 1 and "memory" in errors[0], errors
    assert engine.run(prompts).tokens == expected.tokens


def test_a_cache_that_does_not_fit_is_one_line(device: DeviceUnderTest, fake: FakeDevice, model: str) -> None:
    total = fake.total_memory
    fake.total_memory = fake.allocated_bytes + 32 * 2**20
    try:
        with pytest.raises(OutOfMemory) as raised:
            Engine(device.backend, model, Arrangement(rows=4, tokens=64, cache_tokens=1_000_000))
    finally:
        fake.total_memory = total
    assert "KV cache" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_engine_gives_its_memory_back(fake: FakeDevice, tmp_path: Path) -> None:
    """Beside the module's, which stays open."""
    folder, left, backend = str(write_tiny_model(tmp_path, num_hidden_layers=1)), [], one_bucket()
    for _ in range(2):
        Engine(backend, folder, Arrangement(rows=1, tokens=32)).close()
        left.append(fake.allocated_bytes)
    assert left[0] == left[1]


@pytest.mark.parametrize("functionalize", [False, True], ids=["as traced", "functionalized"])
def test_layers_with_a_window_and_without_under_both_ways_to_compile(
    fake: FakeDevice, tmp_path: Path, prompts: list[list[int]], functionalize: bool
) -> None:
    """Vendors' compilers take a graph apart first, and its mutations with it."""
    folder = str(write_tiny_model(tmp_path, "gemma2"))
    expected = Engine(ReferenceBackend(), folder, ALONE).run(prompts, one_at_a_time=True)
    fake.compiler.functionalize = functionalize
    try:
        engine = Engine(one_bucket(), folder, TIGHT)
        assert engine.run(prompts).tokens == expected.tokens
        assert engine.stats.late_compiles == 0
        engine.close()
    finally:
        fake.compiler.functionalize = False


# 8-bit weights.


def wide_model(folder: Path) -> str:
    """One whose weights are not narrow."""
    return str(write_tiny_model(folder, hidden_size=WIDTH, intermediate_size=512, num_attention_heads=8))


def one_bucket(**options: str) -> StaticBackend:
    backend = open_backend("gaudi", {"token_buckets": "64", "span_buckets": "4", "block_buckets": "48", **options})
    assert isinstance(backend, StaticBackend)
    return backend


def tops(outcome: Outcome) -> dict[int, float]:
    """Log-probabilities of the first token's likeliest, by token."""
    return dict(outcome.logprobs[0][0].top)


def test_8_bit_weights_give_nearly_the_logits_of_whole_ones(
    fake: FakeDevice, tmp_path: Path, prompts: list[list[int]]
) -> None:
    folder, how = wide_model(tmp_path), Arrangement(rows=4, tokens=64, dtype="bfloat16")
    sampling = RowSampling(max_tokens=1, num_logprobs=20)
    found: dict[str, list[dict[int, float]]] = {}
    bytes_of: dict[str, int] = {}
    for name, backend in {"whole": one_bucket(), "fp8": one_bucket(fp8="on")}.items():
        engine = Engine(backend, folder, how)
        assert engine.report is not None
        bytes_of[name] = engine.report.weights_bytes
        found[name] = [tops(engine.run([prompt], sampling)) for prompt in prompts]
        engine.close()
    assert bytes_of["fp8"] < 0.7 * bytes_of["whole"]
    pairs = [(a[token], b[token]) for a, b in zip(*found.values(), strict=True) for token in a.keys() & b.keys()]
    # Each row of the output projection has numbers of deviation 1, and what it multiplies is normed.
    error = np.abs(np.subtract(*np.array(pairs).T)) / WIDTH**0.5
    print(f"fp8: {len(pairs)} of {20 * len(prompts)} likeliest tokens in both; off by {error.mean():.3f} deviations of")
    print(f"the logits on average, by {error.max():.3f} at most")
    assert len(pairs) > 0.8 * 20 * len(prompts)
    assert 0.0 < error.mean() < 0.06


def test_weights_are_within_the_devices_range_and_narrow_ones_whole(fake: FakeDevice) -> None:
    backend = one_bucket(fp8="on")
    weight = torch.randn(640, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    small = backend.ops.prepare_linear(weight)
    assert isinstance(small, Fp8Weight) and small.weight.device.type == small.scale.device.type == "hpu"
    assert small.limit == small.weight.cpu().float().abs().max() == 240
    assert not isinstance(backend.ops.prepare_linear(weight[:100]), Fp8Weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = (backend.ops.linear(x.to("hpu"), small).cpu() - x @ weight.t()).float()
    assert error.abs().max() < 0.03 * (x @ weight.t()).float().abs().max()
    assert re.search("8-bit weights within 240.*no fp8_gemm_v2", backend.providers()["linear"])


@pytest.mark.parametrize(
    ("kind", "limit"), [("GAUDI3", 448.0), ("GAUDI", None)], ids=["Gaudi 3", "the first generation"]
)
def test_another_generation(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, kind: str, limit: float | None) -> None:
    monkeypatch.setattr(fake, "kind", kind)
    if limit is None:
        with pytest.raises(BackendError, match="fp8=on needs one of GAUDI2, GAUDI3, and this device is GAUDI"):
            one_bucket(fp8="on")
        return
    small: Any = one_bucket(fp8="on").ops.prepare_linear(torch.ones(512, 16))
    assert small.limit == limit and small.weight.cpu().float().max() == limit


def test_an_unknown_option_is_one_line() -> None:
    for options, message in itertools.chain(
        [({"graphs": "lazy"}, "has no option graphs"), ({"fp8": "yes"}, "must be off or on")],
        [({"span_buckets": "a"}, "must be positive numbers")],
    ):
        with pytest.raises(BackendError, match=message):
            open_backend("gaudi", options)
