"""The TPU backend's older route, torch_xla, on the host's processor: whole engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import GREEDY, Arrangement, Engine
from isthmus.testing.tiny_model import write_tiny_model
from isthmus.testing.toy_model import VOCAB_SIZE

FEW = {"token_buckets": "64", "span_buckets": "1,4", "block_buckets": "4"}
TIGHT = Arrangement(rows=4, tokens=64, cache_tokens=256, prefix_caching=True)
ALONE = Arrangement(rows=1, overlap=False, graphs=False)
LENGTHS = (1, 2, 17, 50, 100, 33, 16, 70, 128, 100)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def device(xla: Any) -> Iterator[DeviceUnderTest]:
    opened = DeviceUnderTest.open("tpu", FEW)
    yield opened
    opened.close()


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
def engine(device: DeviceUnderTest, model: str) -> Iterator[Engine]:
    running = Engine(device.backend, model, TIGHT)
    yield running
    running.close()


def drawn(index: int) -> RowSampling:
    return RowSampling(max_tokens=12, temperature=0.9, top_k=(0, 20)[index % 2], top_p=0.95, seed=index + 1)


def test_the_route_says_why_it_was_taken(device: DeviceUnderTest) -> None:
    providers = device.backend.providers()
    assert providers["route"].startswith("torch_xla: PJRT_DEVICE=CPU")
    assert providers["artefacts"].startswith("none"), "a CPU's executables cannot be read back"
    assert device.backend.device.host and not device.backend.device.auto
    assert device.backend.memory.device.type == "xla"


def test_every_shape_is_a_program_before_any_request(engine: Engine) -> None:
    shapes = engine.executor._padding.shapes()
    assert [item.shape for item in engine.executor.graphs.captured] == sorted(shapes)
    assert len(shapes) == 6


@pytest.mark.parametrize("sampling", [GREEDY, drawn], ids=["greedy", "drawn"])
def test_tokens_are_the_references_and_nothing_compiles(
    xla: Any, engine: Engine, reference: Engine, prompts: list[list[int]], sampling: RowSampling
) -> None:
    before = xla.compiles()
    wanted = reference.run(prompts, sampling).tokens
    assert engine.run(prompts, sampling).tokens == wanted
    assert engine.run(prompts, sampling).tokens == wanted
    engine.run(prompts, sampling, abort=lambda index: index % 3 == 1)
    assert engine.stats.prefix_hits > 0
    assert xla.compiles() == before
    assert engine.stats.late_compiles == 0


def test_what_outlives_a_step_stays_where_it_is(xla: Any, engine: Engine, prompts: list[list[int]]) -> None:
    state = [store for cache in engine.executor._caches for store in (cache.keys, cache.values)]
    before = [xla.buffer_address(tensor) for tensor in state]
    kept = state[0].cpu().clone()
    engine.run(prompts[2:5])
    assert [xla.buffer_address(tensor) for tensor in state] == before
    assert not torch.equal(state[0].cpu(), kept)


def test_one_copy_down_a_step(xla: Any, engine: Engine) -> None:
    before, steps = xla.downloads(), engine.stats.steps
    engine.run([[5, 6, 7]], GREEDY)
    assert xla.downloads() - before == engine.stats.steps - steps == GREEDY.max_tokens


def test_what_was_fetched_is_a_copy_and_costs_no_program(xla: Any, device: DeviceUnderTest) -> None:
    memory, numbers = device.parts.memory, device.put(torch.arange(7, dtype=torch.int32))
    memory.synchronize()
    programs, downloads = xla.compiles(), xla.downloads()
    pending = memory.fetch([numbers])
    numbers.add_(100)
    [found] = pending.result()
    assert found.tolist() == list(range(7))
    assert (xla.compiles(), xla.downloads()) == (programs, downloads + 1)
    assert numbers.cpu().tolist() == list(range(100, 107))


def test_a_model_in_bfloat16_runs(device: DeviceUnderTest, model: str, prompts: list[list[int]]) -> None:
    """Last, because it takes the device's inputs from the engine that ran till now."""
    running = Engine(device.backend, model, Arrangement(rows=4, tokens=64, cache_tokens=1024, dtype="bfloat16"))
    found = running.run(prompts)
    running.close()
    assert all(len(tokens) == GREEDY.max_tokens for tokens in found.tokens.values())
    assert running.stats.late_compiles == 0
