"""Tiny models end to end: the reference backend's tokens, however requests are scheduled.

A backend that brings its own executor and model is compared with itself running one request at a
time, eagerly and with nothing in flight.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from isthmus.contract import GraphScope
from isthmus.errors import InvalidRequest
from isthmus.executor import Executor
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import GREEDY, Arrangement, Engine, Outcome, small_blocks
from isthmus.testing.tiny_model import MODELS, write_tiny_model
from isthmus.testing.toy_model import VOCAB_SIZE

PROMPT_LENGTHS = (1, 2, 17, 50, 100, 33, 16, 5, 70, 128)
ALONE = Arrangement(rows=1, overlap=False, graphs=False)
NEEDS = {"llama": (), "qwen3": (), "gemma2": ("sliding_window", "logit_softcap"), "mixtral": ("experts",)}
NEAR = {"bfloat16": 0.35, "float16": 0.05}
"""How much less likely, in nats by the reference, a token of a coarser dtype may be than the likeliest."""
ELSEWHERE_ROUTED = 0.05
"""Share of tokens that may be further off in a coarser dtype, where a router may choose another of two experts
that the reference finds nearly alike."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(17)
    return [rng.integers(0, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, Path] = {}

    def by_name(name: str) -> str:
        if name not in made:
            made[name] = write_tiny_model(tmp_path_factory.mktemp(name), name)
        return str(made[name])

    return by_name


@contextlib.contextmanager
def engine(device: DeviceUnderTest, model: str, how: Arrangement) -> Iterator[Engine]:
    running = Engine(device.backend, device.model or model, how)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def expected(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str], prompts: list[list[int]]
) -> Callable[[str], Outcome]:
    made: dict[str, Outcome] = {}

    def by_name(name: str) -> Outcome:
        if name not in made:
            backend = ReferenceBackend() if isthmus_device.has_parts else isthmus_device.backend
            model = folder(name) if isthmus_device.has_parts else isthmus_device.model or folder(name)
            running = Engine(backend, model, ALONE)
            made[name] = running.run(prompts, one_at_a_time=True)
            running.close()
        return made[name]

    return by_name


def finest(device: DeviceUnderTest) -> str:
    if not device.has_parts:
        return "auto"
    return next(name for name in ("float32", "bfloat16", "float16") if name in device.capabilities.dtypes)


def require_tokens(
    found: Outcome,
    expected: Outcome,
    model: str,
    prompts: Sequence[Sequence[int]],
    dtype: str,
    *,
    far_off: float = 0.0,
) -> None:
    """Equal tokens; in a coarser dtype, tokens that the reference finds as likely as its own, nearly."""
    if dtype not in NEAR:
        for index in expected.tokens:
            own, wanted = found.tokens.get(index), expected.tokens[index]
            assert own == wanted, f"the prompt of {len(prompts[index])} tokens gave {own}; it must give {wanted}"
        return
    reference = Engine(ReferenceBackend(), model, ALONE)
    whole = [[*prompts[index], *found.tokens[index]] for index in sorted(found.tokens)]
    scored = reference.run(whole, RowSampling(max_tokens=1, num_prompt_logprobs=1))
    reference.close()
    left = int(far_off * sum(map(len, found.tokens.values())))
    for index, prompt in enumerate(prompts):
        for place, entry in enumerate(scored.prompt_logprobs[index][len(prompt) :]):
            gap = entry.top[0][1] - entry.logprob
            if gap > NEAR[dtype] and left > 0:
                left -= 1
                continue
            assert gap <= NEAR[dtype], (
                f"prompt of {len(prompt)} tokens: output {place} is {entry.token}, {gap:.3f} nats less likely than "
                f"{entry.top[0][0]}; in {dtype} it may be {NEAR[dtype]}"
            )


def arrangements() -> dict[str, Arrangement]:
    return {
        "one at a time": Arrangement(rows=1),
        "together": Arrangement(),
        "eager": Arrangement(graphs=False),
        "in small chunks": Arrangement(rows=4, tokens=16),
        "nothing in flight": Arrangement(overlap=False),
        "prefix cache": Arrangement(prefix_caching=True),
    }


@pytest.mark.mandatory
@pytest.mark.parametrize("arranged", arrangements())
def test_tokens_do_not_depend_on_the_schedule(
    isthmus_device: DeviceUnderTest,
    folder: Callable[[str], str],
    prompts: list[list[int]],
    expected: Callable[[str], Outcome],
    arranged: str,
) -> None:
    dtype = finest(isthmus_device)
    how = arrangements()[arranged]
    with engine(isthmus_device, folder("llama"), dataclasses.replace(how, dtype=dtype)) as running:
        found = running.run(prompts)
        require_tokens(found, expected("llama"), folder("llama"), prompts, dtype)
        again = running.run(prompts)
        require_tokens(again, expected("llama"), folder("llama"), prompts, dtype)
        if how.prefix_caching:
            size = running.executor.limits.block_size
            hits = {index: again.cached[index] for index, prompt in enumerate(prompts) if len(prompt) > size}
            assert all(hits.values()), f"the second time, the prefixes were not found in the cache: {hits}"


@pytest.mark.requires_parts
@pytest.mark.parametrize("rows", [1, 4])
def test_prompts_and_decodes_of_captured_steps(
    isthmus_device: DeviceUnderTest,
    folder: Callable[[str], str],
    prompts: list[list[int]],
    expected: Callable[[str], Outcome],
    rows: int,
) -> None:
    """Steps of spans of any lengths, in every dtype: each may have an attention of its own for long spans."""
    capabilities = isthmus_device.capabilities
    if not capabilities.mixed_graph_tokens:
        pytest.skip("undeclared: mixed_graph_tokens")
    for dtype in capabilities.dtypes:
        with engine(isthmus_device, folder("llama"), Arrangement(rows=rows, tokens=40, dtype=dtype)) as running:
            assert isinstance(running.executor, Executor)
            captured = [item.shape for item in running.executor.graphs.captured if not item.shape.single]
            assert captured and captured[-1].tokens == min(40, capabilities.mixed_graph_tokens[-1])
            require_tokens(running.run(prompts), expected("llama"), folder("llama"), prompts, dtype)


@pytest.mark.requires_parts
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_other_architectures(
    isthmus_device: DeviceUnderTest,
    folder: Callable[[str], str],
    prompts: list[list[int]],
    expected: Callable[[str], Outcome],
    name: str,
) -> None:
    missing = [need for need in NEEDS[name] if not isthmus_device.declares(need)]
    if missing:
        pytest.skip(f"undeclared: {', '.join(missing)}")
    # The preferred dtype too: what serves it may know less than what serves the finest.
    for dtype in dict.fromkeys((finest(isthmus_device), isthmus_device.capabilities.dtypes[0])):
        with engine(isthmus_device, folder(name), Arrangement(dtype=dtype)) as running:
            found = running.run(prompts)
        far_off = ELSEWHERE_ROUTED if "experts" in NEEDS[name] else 0.0
        require_tokens(found, expected(name), folder(name), prompts, dtype, far_off=far_off)


@pytest.mark.requires_parts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_declared(
    isthmus_device: DeviceUnderTest,
    folder: Callable[[str], str],
    prompts: list[list[int]],
    expected: Callable[[str], Outcome],
    dtype: str,
) -> None:
    if dtype not in isthmus_device.capabilities.dtypes:
        pytest.skip(f"undeclared: dtypes={dtype}")
    with engine(isthmus_device, folder("llama"), Arrangement(dtype=dtype, rows=6)) as running:
        require_tokens(running.run(prompts), expected("llama"), folder("llama"), prompts, dtype)


@pytest.mark.mandatory
def test_preempted_requests_go_on_where_they_were(
    isthmus_device: DeviceUnderTest,
    folder: Callable[[str], str],
    prompts: list[list[int]],
    expected: Callable[[str], Outcome],
) -> None:
    dtype = finest(isthmus_device)
    size, longer = small_blocks(isthmus_device.capabilities), RowSampling(max_tokens=40)
    short = [prompt for prompt in prompts if len(prompt) <= 50] * 2
    with engine(isthmus_device, folder("llama"), Arrangement(rows=1, dtype=dtype)) as running:
        wanted = running.run(short, longer, one_at_a_time=True)
    with engine(
        isthmus_device, folder("llama"), Arrangement(cache_tokens=192, dtype=dtype, block_size=size)
    ) as running:
        # So many short answers that the scheduler takes the next ones to be short as well.
        running.run([[7]] * 40, RowSampling(max_tokens=1))
        found = running.run(short, longer)
        assert running.stats.preemptions > 0, "nothing was preempted: this test tests nothing"
    assert found.tokens == wanted.tokens


@pytest.mark.mandatory
def test_prefixes_that_requests_share_are_computed_once(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str], prompts: list[list[int]]
) -> None:
    dtype = finest(isthmus_device)
    prefix = prompts[4][:64]
    shared = [[*prefix, *prompts[3][:length]] for length in (1, 3, 20, 33)]
    with engine(isthmus_device, folder("llama"), Arrangement(rows=1, dtype=dtype)) as running:
        wanted = running.run(shared, one_at_a_time=True)
    size = small_blocks(isthmus_device.capabilities)
    how = Arrangement(prefix_caching=True, dtype=dtype, block_size=size)
    with engine(isthmus_device, folder("llama"), how) as running:
        running.run([prefix])
        found = running.run(shared)
        assert running.stats.prefix_hits > 0
    assert found.tokens == wanted.tokens


@pytest.mark.mandatory
def test_aborted_requests_leave_the_others_alone(
    isthmus_device: DeviceUnderTest,
    folder: Callable[[str], str],
    prompts: list[list[int]],
    expected: Callable[[str], Outcome],
) -> None:
    dtype = finest(isthmus_device)
    with engine(isthmus_device, folder("llama"), Arrangement(rows=4, tokens=32, dtype=dtype)) as running:
        whole = running.run(prompts)
        for odd in (0, 1):
            found = running.run(prompts, abort=lambda index, odd=odd: index % 2 == odd)  # type: ignore[misc]
            for index in range(1 - odd, len(prompts), 2):
                assert found.tokens[index] == whole.tokens[index]
        stats = running.stats
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks, "blocks of ended requests are held"


@pytest.mark.mandatory
def test_draws_do_not_depend_on_the_company(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str], prompts: list[list[int]]
) -> None:
    def drawn(index: int) -> RowSampling:
        return RowSampling(max_tokens=8, temperature=0.9, top_p=0.95, seed=1000 + index)

    dtype = finest(isthmus_device)
    if dtype in NEAR:
        prompts = prompts[:4]  # a draw may fall on the edge between two tokens
    with engine(isthmus_device, folder("llama"), Arrangement(rows=1, dtype=dtype)) as running:
        alone = running.run(prompts, drawn, one_at_a_time=True)
    for how in (Arrangement(dtype=dtype), Arrangement(dtype=dtype, rows=4, tokens=24, graphs=False)):
        with engine(isthmus_device, folder("llama"), how) as running:
            assert running.run(prompts, drawn).tokens == alone.tokens
            assert running.run([prompts[0]] * 2, drawn).tokens[0] == alone.tokens[0]


@pytest.mark.requires_parts
@pytest.mark.requires_capability("logprobs")
def test_logprobs_of_prompts_and_outputs(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str], prompts: list[list[int]]
) -> None:
    dtype = finest(isthmus_device)
    of_prompts = 2 if isthmus_device.capabilities.prompt_logprobs else -1
    sampling = RowSampling(max_tokens=4, num_logprobs=3, num_prompt_logprobs=of_prompts)
    reference = Engine(ReferenceBackend(), folder("llama"), ALONE)
    wanted = reference.run(prompts[:6], sampling)
    reference.close()
    with engine(isthmus_device, folder("llama"), Arrangement(tokens=48, rows=4, dtype=dtype)) as running:
        found = running.run(prompts[:6], sampling)
    for index in range(6):
        for kind in ("prompt_logprobs", "logprobs"):
            own, other = getattr(found, kind)[index], getattr(wanted, kind)[index]
            assert len(own) == len(other)
            if dtype in NEAR and kind == "logprobs":
                continue  # the tokens may differ
            for mine, theirs in zip(own, other, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert mine.token == theirs.token
                    near = NEAR.get(dtype, 2e-3) * (1 + abs(theirs.logprob) / 8)
                    assert abs(mine.logprob - theirs.logprob) < near


@pytest.mark.requires_capability("graph_scope")
@pytest.mark.requires_parts
def test_graphs_are_captured_where_they_are_declared(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str]
) -> None:
    how = Arrangement(dtype=finest(isthmus_device))
    with engine(isthmus_device, folder("llama"), how) as running:
        assert running.report is not None
        assert running.report.num_graphs > 0, f"graph_scope is declared; {'; '.join(running.report.notes)}"


@pytest.mark.requires_parts
def test_nothing_is_captured_where_nothing_is_declared(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str]
) -> None:
    if isthmus_device.capabilities.graph_scope is not GraphScope.NONE:
        return
    with engine(isthmus_device, folder("llama"), Arrangement(dtype=finest(isthmus_device))) as running:
        assert running.report is not None and running.report.num_graphs == 0


@pytest.mark.mandatory
def test_a_request_that_can_never_fit_is_refused_and_harms_nobody(
    isthmus_device: DeviceUnderTest, folder: Callable[[str], str], prompts: list[list[int]]
) -> None:
    with engine(isthmus_device, folder("llama"), Arrangement(dtype=finest(isthmus_device))) as running:
        before = running.run(prompts[:2]).tokens
        with pytest.raises(InvalidRequest):
            running.run([[1] * 500])
        with pytest.raises(InvalidRequest):
            running.run([[running.executor.limits.vocab_size]])
        assert running.run(prompts[:2], GREEDY).tokens == before
