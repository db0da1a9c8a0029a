"""The Neuron backend over torch_xla, on the host's processor: whole engines, and what AWS's compiler would be given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.contract import StepShape
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import GREEDY, Arrangement, Engine
from isthmus.testing.tiny_model import MODELS, write_tiny_model
from isthmus.testing.toy_model import VOCAB_SIZE
from isthmus_neuron.hlo import lint, operators

FEW = {"token_buckets": "64", "span_buckets": "1,4", "block_buckets": "4"}
TIGHT = Arrangement(rows=4, tokens=64, cache_tokens=256, prefix_caching=True)
ALONE = Arrangement(rows=1, overlap=False, graphs=False)
LENGTHS = (1, 2, 17, 50, 100, 33, 16, 70, 128, 100)

pytestmark = pytest.mark.timeout(600)


class Listening:
    """A module of :mod:`isthmus_static.xla` that lowers what it compiles, before it does."""

    def __init__(self, xla: Any) -> None:
        self.texts: list[str] = []
        self._xla = xla

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xla, name)

    def compile_step(self, step: Callable[[], Any], inputs: Any, state: Any) -> Any:
        self.texts.append(self._xla.lowered(step, state))
        return self._xla.compile_step(step, inputs, state)


@pytest.fixture(scope="module")
def device(xla: Any) -> Iterator[DeviceUnderTest]:
    opened = DeviceUnderTest.open("neuron", FEW)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def lowered(xla: Any) -> Iterator[Listening]:
    from isthmus_static import xla_programs

    listening = Listening(xla)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_programs, "xla", listening)
        yield listening


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
def engine(device: DeviceUnderTest, model: str, lowered: Listening) -> Iterator[Engine]:
    running = Engine(device.backend, model, TIGHT)
    yield running
    running.close()


def drawn(index: int) -> RowSampling:
    return RowSampling(max_tokens=12, temperature=0.9, top_k=(0, 20)[index % 2], top_p=0.95, seed=index + 1)


def test_the_route_says_why_it_was_taken(device: DeviceUnderTest) -> None:
    route = device.backend.providers()["route"]
    assert route.startswith("xla: ")
    assert "PJRT_DEVICE=CPU" in route
    assert device.backend.memory.device.type == "xla"


def test_every_shape_is_a_program_before_any_request(engine: Engine) -> None:
    shapes: list[StepShape] = engine.executor._padding.shapes()
    assert [item.shape for item in engine.executor.graphs.captured] == sorted(shapes)
    assert len(shapes) == 6


def test_greedy_tokens_are_the_references_and_nothing_compiles(
    xla: Any, engine: Engine, reference: Engine, prompts: list[list[int]]
) -> None:
    before = xla.compiles()
    wanted = reference.run(prompts).tokens
    assert engine.run(prompts).tokens == wanted
    assert engine.run(prompts).tokens == wanted
    assert engine.run(prompts, abort=lambda index: index == 8).tokens.keys() >= {0, 1, 2}
    assert engine.stats.prefix_hits > 0
    assert xla.compiles() == before
    assert engine.stats.late_compiles == 0


def test_drawn_tokens_are_the_references_and_nothing_compiles(
    xla: Any, engine: Engine, reference: Engine, prompts: list[list[int]]
) -> None:
    before = xla.compiles()
    assert engine.run(prompts, drawn).tokens == reference.run(prompts, drawn).tokens
    assert xla.compiles() == before
    assert engine.stats.late_compiles == 0


def test_what_outlives_a_step_stays_where_it_is(xla: Any, engine: Engine, prompts: list[list[int]]) -> None:
    state = [store for cache in engine.executor._caches for store in (cache.keys, cache.values)]
    state += [engine.executor._device.tokens, engine.executor._device.block_tables]
    before = [xla.buffer_address(tensor) for tensor in state]
    kept = state[0].cpu().clone()
    engine.run(prompts[2:5])
    assert [xla.buffer_address(tensor) for tensor in state] == before
    assert not torch.equal(state[0].cpu(), kept)


def test_one_copy_down_a_step(xla: Any, engine: Engine, prompts: list[list[int]]) -> None:
    before, steps = xla.downloads(), engine.stats.steps
    engine.run([[5, 6, 7]], GREEDY)
    assert xla.downloads() - before == engine.stats.steps - steps == GREEDY.max_tokens


def test_every_program_is_of_documented_operations_and_static_shapes(engine: Engine, lowered: Listening) -> None:
    """Every captured shape, the start of a row, and both ways to sample at each size."""
    assert len(lowered.texts) >= len(engine.executor._padding.shapes()) + 1 + 2 * 2
    for text in lowered.texts:
        assert lint(text) == [], operators(text)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_of_documented_operations(
    device: DeviceUnderTest, lowered: Listening, name: str, dtype: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    folder = str(write_tiny_model(tmp_path / "model", name))
    lowered.texts.clear()
    running = Engine(device.backend, folder, dataclasses.replace(TIGHT, cache_tokens=1024, dtype=dtype))
    found = running.run(prompts)
    running.close()
    assert running.stats.late_compiles == 0
    for text in lowered.texts:
        assert lint(text) == [], operators(text)
    if dtype == "float32":
        reference = Engine(ReferenceBackend(), folder, ALONE)
        assert found.tokens == reference.run(prompts, one_at_a_time=True).tokens
