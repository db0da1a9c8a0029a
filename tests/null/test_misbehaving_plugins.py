"""Plugins that open and then do wrong: one line for the user at start-up, one failed request afterwards.

What goes wrong before a device is open is in ``test_plugins.py``; an engine process that dies, in
``test_engine_process.py`` and, as clients of the server see it, in ``tests/server/test_failures.py``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.contract import CONTRACT_VERSION
from isthmus.engine.local import LocalEngine
from isthmus.engine.messages import AddRequest, FinishReason, TokensOut, pack_tokens
from isthmus.errors import BackendError, ContractMismatch, EngineDead, InvalidRequest, OutOfMemory
from isthmus.plugins import open_backend, select_backend
from isthmus.sampling_params import RowSampling
from isthmus.testing.tiny_model import write_tiny_model

PLUGIN = """
import torch
from isthmus.contract import DeviceInfo
from isthmus.errors import OutOfMemory
from isthmus.hookspecs import hookimpl
from isthmus.reference import *
CONTRACT_VERSION = (1, 0)
CPU = torch.device("cpu")
DEVICE = DeviceInfo(backend="odd", index=0, name="cpu", auto=False)

{part}

@hookimpl
def isthmus_probe(): return [DEVICE]

@hookimpl
def isthmus_open(device, options): return ReferenceBackend(name="odd", **PARTS)
"""
BAD_TOKEN, DEADLY_TOKEN = 250, 251
"""In these tests, the prompts that hold them are the ones that something happens to."""
CAN_FAIL = f"""
class Odd(ReferenceSampling):
    def sample(self, logits, inputs, device, state, num_logprobs):
        first = device.tokens[inputs.sample_rows.long(), 0]
        if bool((first == {DEADLY_TOKEN}).any()):
            raise RuntimeError("the device fell off the bus\\nfor good")
        logits = logits.clone()
        logits[first == {BAD_TOKEN}] = float("nan")
        return super().sample(logits, inputs, device, state, num_logprobs)
PARTS = dict(sampling=Odd(CPU))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(source: str) -> None:
        module = f"odd_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / "odd_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[isthmus.backends]\nodd = {module}\n")

    return install


def start(model: str) -> LocalEngine:
    options = EngineOptions(
        model=ModelOptions(model=model, dtype="float32", max_model_len=64),
        cache=CacheOptions(num_blocks=16),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=64),
        backend=BackendOptions(device="odd"),
    )
    return LocalEngine.start(options, progress=False)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            """
class Odd(ReferenceAttention):
    def allocate(self, layers, limits, kv_dtype): return []
PARTS = dict(attention=Odd(CPU))
""",
            "while allocating the KV cache: ValueError: attention.allocate returned 0 for the caches of 2 layers",
        ),
        (
            """
class Odd(ReferenceAttention):
    def allocate(self, layers, limits, kv_dtype): pass
PARTS = dict(attention=Odd(CPU))
""",
            "attention.allocate returned NoneType for the caches of 2 layers",
        ),
        (
            """
class Odd(ReferenceOps):
    def gated_activation(self, gate_up, activation): return gate_up
PARTS = dict(ops=Odd(CPU))
""",
            "failed while running its largest step: RuntimeError",
        ),
        (
            """
class Odd(ReferenceOps):
    def logits(self, hidden, weight, softcap): return super().logits(hidden, weight, softcap)[:, :0]
PARTS = dict(ops=Odd(CPU))
""",
            "failed while running its largest step",
        ),
        (
            """
class Odd(ReferenceInputs):
    def upload(self, plan, device): raise OSError("no such queue\\nat all")
PARTS = dict(inputs=Odd(CPU))
""",
            "failed while running its largest step: OSError: no such queue at all",
        ),
        (
            """
class Odd(ReferenceSampling):
    def sample(self, *arguments):
        sampled = super().sample(*arguments)
        sampled.tokens = sampled.tokens[:0]
        return sampled
PARTS = dict(sampling=Odd(CPU))
""",
            "sampled tokens of shape (0,), of which (4,) may be invalid, for 4 rows",
        ),
    ],
    ids=["allocates nothing", "allocates None", "wrong shape", "no logits", "raises", "too few tokens"],
)
def test_a_fault_at_start_up_is_one_line(install: Callable[[str], None], model: str, part: str, says: str) -> None:
    install(PLUGIN.format(part=part))
    with pytest.raises(BackendError) as raised:
        start(model)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_device_without_memory_is_out_of_memory(install: Callable[[str], None], model: str) -> None:
    part = """
class Odd(ReferenceAttention):
    def allocate(self, layers, limits, kv_dtype): raise OutOfMemory("the cache does not fit; ask for less")
PARTS = dict(attention=Odd(CPU))
"""
    install(PLUGIN.format(part=part))
    with pytest.raises(OutOfMemory, match="ask for less"):
        start(model)


@pytest.fixture
def engine(install: Callable[[str], None], model: str) -> Iterator[LocalEngine]:
    install(PLUGIN.format(part=CAN_FAIL))
    engine = start(model)
    yield engine
    engine.close()


def run(engine: LocalEngine, prompts: list[list[int]]) -> list[list[TokensOut]]:
    requests = [
        AddRequest(request_id=engine.next_request_id(), prompt=pack_tokens(prompt), sampling=RowSampling(max_tokens=5))
        for prompt in prompts
    ]
    found: dict[int, list[TokensOut]] = {request.request_id: [] for request in requests}
    for item in engine.generate(requests):
        found[item.request_id].append(item)
    return list(found.values())


def tokens(items: list[TokensOut]) -> list[int]:
    return [token for item in items for token in item.tokens]


def test_nan_ends_its_request_and_no_other(engine: LocalEngine) -> None:
    [alone] = run(engine, [[1, 2, 3]])
    good, bad = run(engine, [[1, 2, 3], [BAD_TOKEN, 2]])
    assert tokens(good) == tokens(alone) and good[-1].finish_reason is FinishReason.LENGTH
    assert bad[-1].finish_reason is FinishReason.ERROR
    assert bad[-1].error and "\n" not in bad[-1].error


def test_a_step_that_dies_ends_its_requests_and_the_next_ones_run(engine: LocalEngine) -> None:
    [alone] = run(engine, [[1, 2, 3]])
    [died] = run(engine, [[DEADLY_TOKEN]])
    assert died[-1].finish_reason is FinishReason.ERROR
    assert "RuntimeError: the device fell off the bus for good" in died[-1].error
    assert tokens(run(engine, [[1, 2, 3]])[0]) == tokens(alone)


def test_a_device_that_keeps_dying_ends_the_engine(engine: LocalEngine) -> None:
    with pytest.raises(EngineDead, match="3 times in a row, last with: RuntimeError: the device fell off the bus"):
        for _ in range(4):
            run(engine, [[DEADLY_TOKEN]])


FEW = """
import dataclasses
PARTS = dict(capabilities=dataclasses.replace(REFERENCE_CAPABILITIES, {absent}=False))
"""


@pytest.mark.parametrize(
    ("absent", "sampling", "says"),
    [
        ("logprobs", RowSampling(max_tokens=2, num_logprobs=3), "logprobs is 3, and this device does not give"),
        ("prompt_logprobs", RowSampling(max_tokens=2, num_prompt_logprobs=0), "prompt_logprobs is 0, and this"),
    ],
)
def test_what_is_not_declared_is_refused_before_it_runs(
    install: Callable[[str], None],
    model: str,
    absent: str,
    sampling: RowSampling,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(PLUGIN.format(part=FEW.format(absent=absent)))
    with caplog.at_level("INFO"):
        engine = start(model)
    try:
        asked = AddRequest(request_id=engine.next_request_id(), prompt=pack_tokens([1, 2]), sampling=sampling)
        with pytest.raises(InvalidRequest, match=says) as raised:
            list(engine.generate([asked]))
        assert raised.value.param == absent and "\n" not in str(raised.value)
        assert engine.stats.steps == 0
        assert "refused: the backend does not declare them" in caplog.text
        other = {"logprobs": "num_prompt_logprobs", "prompt_logprobs": "num_logprobs"}[absent]
        served = RowSampling(max_tokens=2, **{other: 1})
        asked = AddRequest(request_id=engine.next_request_id(), prompt=pack_tokens([1, 2]), sampling=served)
        *_, last = engine.generate([asked])
        assert last.finish_reason is FinishReason.LENGTH
    finally:
        engine.close()


MAJOR, MINOR = CONTRACT_VERSION


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ((MAJOR + 1, 0), "upgrade Isthmus"),
        ((MAJOR, MINOR + 1), "upgrade Isthmus"),
        ((MAJOR - 1, MINOR + 5), "upgrade the plugin"),
    ],
    ids=["newer major", "newer minor", "older major"],
)
def test_a_contract_that_this_core_does_not_speak(
    install: Callable[[str], None], version: tuple[int, int], remedy: str
) -> None:
    install(PLUGIN.format(part="PARTS = {}").replace("(1, 0)", repr(version)))
    with pytest.raises(ContractMismatch) as raised:
        open_backend("odd", {})
    text = str(raised.value)
    assert remedy in text and f"{version[0]}.{version[1]}" in text and str(CONTRACT_VERSION) in text


def test_a_plugin_of_an_older_minor_runs_on_a_newer_core(
    install: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.contract import version

    monkeypatch.setattr(version, "CONTRACT_VERSION", version.ContractVersion(MAJOR, MINOR + 3))
    install(PLUGIN.format(part="PARTS = {}"))
    open_backend("odd", {}).close()


def test_a_probe_that_hangs_in_a_driver_is_left_behind(install: Callable[[str], None]) -> None:
    source = PLUGIN.format(part="PARTS = {}").replace(
        "def isthmus_probe(): return", "def isthmus_probe():\n    import time; time.sleep(30)\n    return"
    )
    install(textwrap.dedent(source))
    with pytest.raises(BackendError, match=r"did not answer its probe within 0\.2 s; its driver may hang") as raised:
        select_backend("odd", deadline_s=0.2)
    assert "\n" not in str(raised.value)
