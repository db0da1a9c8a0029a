"""The Neuron backend: found or not in one line, its settings, and the whole engine on a stand-in for TorchNeuron."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contract import AttentionSpec, GraphScope, Limits, ShapePolicy, SpanMix, StepShape
from isthmus.errors import BackendError, BackendUnavailable
from isthmus.executor.shapes import Padding
from isthmus_neuron import artefacts, hardware, isthmus_capabilities, isthmus_open, sdk
from isthmus_neuron.capabilities import BLOCK_SIZES, CAPABILITIES, PARTITIONS, context_blocks
from isthmus_neuron.layout import TiledRowLayout
from isthmus_neuron.ops import DocumentedOps
from isthmus_neuron.probe import probe_devices
from isthmus_neuron.sdk import Route
from isthmus_static.layout import PagedCache, StaticStepInputs
from isthmus_static.row_attention import RowLayout
from isthmus_static.step_buffer import StepBuffer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STAND_INS = HERE.parent / "stand_ins"
MODEL = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT_S = 600
FEW = ("token_buckets=256", "span_buckets=8", "block_buckets=")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for the fake device"
)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(STAND_INS), str(STAND_INS / "neuron")]),
        "ISTHMUS_CACHE": str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        **more,
    }


def python(
    *arguments: str, environment: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT
    )


def isthmus(*arguments: str, environment: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> tuple[int, str, str]:
    code = "from isthmus_server.cli import main; main()"
    done = python("-c", code, *arguments, environment=environment, timeout_s=timeout_s)
    return done.returncode, done.stdout, done.stderr


def line_of_neuron(listed: str) -> str:
    return next(line for line in listed.splitlines() if line.startswith("neuron"))


# Found, or not.


class Installed:
    """Packages that are there, as far as the backend's look goes: modules on a path of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delenv("PJRT_DEVICE", raising=False)

    def add(self, module: str, text: str) -> None:
        (self._folder / module).mkdir()
        (self._folder / module / "__init__.py").write_text(text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    for module in ("torch_neuronx", "torch_xla"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return Installed(tmp_path / "site", monkeypatch)


def test_without_software_one_line_says_where_it_comes_from() -> None:
    with pytest.raises(BackendUnavailable) as raised:
        probe_devices()
    said = str(raised.value)
    assert "needs torch-neuronx" in said and "not on PyPI" in said and "Neuron package repository" in said
    assert "\n" not in said


def test_the_placeholder_of_that_name_on_pypi_is_told_apart(installed: Installed) -> None:
    """What version 1.0 of torch-neuronx on PyPI holds."""
    line = "WRONG PACKAGE. Please install the package from Neuron Repository - pip.repos.neuron.amazonaws.com"
    installed.add("torch_neuronx", f'raise ImportError("{line}")\n')
    with pytest.raises(BackendUnavailable, match=r"placeholder of that name on PyPI.* uninstall it"):
        probe_devices()
    assert "torch_neuronx" not in sys.modules


@pytest.mark.parametrize(
    ("version", "with_xla", "route", "reason"),
    [
        ("2.13.3", False, Route.NATIVE, "2.13.3 has a device of its own"),
        ("2.14.3+abc", False, Route.NATIVE, "2.14.3"),
        ("2.13.3", True, Route.NATIVE, "torch_xla is installed too and not used: the newer line wins"),
        ("2.9.0.2.11", True, Route.XLA, "of the line that runs over torch_xla"),
    ],
)
def test_the_route_is_what_is_installed_and_says_why(
    installed: Installed, version: str, with_xla: bool, route: Route, reason: str
) -> None:
    installed.add("torch_neuronx", f'raise SystemExit("imported")\n__version__ = "{version}"\n')
    if with_xla:
        installed.add("torch_xla", "")
    found = sdk.find({})
    assert (found.route, found.rehearsal) == (route, False)
    assert reason in found.reason


def test_half_of_the_older_line_is_one_line(installed: Installed) -> None:
    installed.add("torch_neuronx", '__version__ = "2.9.0.2.11"\n')
    with pytest.raises(BackendUnavailable, match=r"runs over torch_xla 2\.9, which is missing"):
        probe_devices()


def test_torch_xla_alone_is_no_neuron_unless_it_stands_in(installed: Installed) -> None:
    installed.add("torch_xla", "")
    with pytest.raises(BackendUnavailable, match="needs torch-neuronx"):
        sdk.find({})
    found = sdk.find({"PJRT_DEVICE": "CPU"})
    assert found.rehearsal and "no AWS device is used" in found.reason


def test_software_for_another_torch_is_one_line(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "configure", lambda *_arguments: None)
    installed.add("torch_neuronx", '__version__ = "2.13.3"\nraise ImportError("undefined symbol:\\n _ZN5torch")\n')
    with pytest.raises(BackendUnavailable) as raised:
        probe_devices()
    assert "cannot be imported (ImportError: undefined symbol: _ZN5torch)" in str(raised.value)


def driver(root: Path, chips: list[tuple[str, int]]) -> Path:
    for number, (chip, cores) in enumerate(chips):
        device = root / hardware.DEVICES / f"neuron{number}"
        (device / "info/architecture").mkdir(parents=True)
        (device / "info/architecture/device_name").write_text(chip + "\n")
        for core in range(cores):
            for kind, taken in (("tensors", 3 * 2**30), ("model_code", 2**20)):
                counter = device / f"neuron_core{core}/stats/memory_usage/device_mem/{kind}"
                counter.mkdir(parents=True)
                (counter / "total").write_text(f"{taken}\n")
                (counter / "peak").write_text(f"{2 * taken}\n")
    return root


def test_the_older_line_counts_cores_by_the_driver_and_imports_nothing(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(artefacts, "configure", lambda *_arguments: None)
    installed.add("torch_neuronx", 'raise SystemExit("imported")\n__version__ = "2.9.0.2.11"\n')
    installed.add("torch_xla", 'raise SystemExit("imported")\n')
    with pytest.raises(BackendUnavailable, match="the driver lists no NeuronCore for it"):
        probe_devices(tmp_path / "none")
    root = driver(tmp_path / "two", [("Inferentia2", 2), ("Inferentia2", 2)])
    found = probe_devices(root)
    assert [(device.index, device.name, device.memory_bytes // 2**30) for device in found] == [
        (index, "AWS Inferentia2", 16) for index in range(4)
    ]
    monkeypatch.setenv(hardware.VISIBLE_CORES, "0,2-3")
    assert [device.index for device in probe_devices(root)] == [0, 2, 3]
    assert {core.used_bytes() for core in hardware.cores(root)} == {3 * 2**30 + 2**20}


@needs_compiler
def test_what_isthmus_backends_prints(tmp_path: Path) -> None:
    code, there, err = isthmus("backends", environment=environment(tmp_path, COLUMNS="200"))
    assert code == 0, err
    assert "0: AWS NeuronCore" in line_of_neuron(there)
    _, none, _ = isthmus("backends", environment=environment(tmp_path, COLUMNS="500", FAKE_DEVICE_COUNT="0"))
    assert "finds no NeuronCore" in line_of_neuron(none) and "neuron-ls" in line_of_neuron(none)


# Settings.


def test_artefacts_are_kept_for_each_version_of_the_compiler(tmp_path: Path) -> None:
    settings = {"XDG_CACHE_HOME": str(tmp_path)}
    artefacts.configure(Route.NATIVE, "2.26.1", settings)
    folder = tmp_path / "isthmus/neuron/neuronx-cc-2.26.1"
    assert settings["TORCH_NEURONX_NEFF_CACHE_DIR"] == str(folder / "neff")
    assert settings["TORCH_NEURONX_HLO_CACHE_DIR"] == str(folder / "hlo")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert str(folder) in artefacts.said(Route.NATIVE, settings)
    older = {"XDG_CACHE_HOME": str(tmp_path)}
    artefacts.configure(Route.XLA, "2.21.0", older)
    assert older["NEURON_COMPILE_CACHE_URL"] == str(tmp_path / "isthmus/neuron/neuronx-cc-2.21.0/neuron-compile-cache")


@pytest.mark.parametrize(
    ("route", "mine"),
    [
        (Route.NATIVE, {"TORCH_NEURONX_NEFF_CACHE_DIR": "/mine"}),
        (Route.XLA, {"NEURON_COMPILE_CACHE_URL": "s3://mine/cache"}),
        (Route.XLA, {"NEURON_CC_FLAGS": "--cache_dir=/mine -O1"}),
    ],
)
def test_what_the_user_has_set_stands(tmp_path: Path, route: Route, mine: dict[str, str]) -> None:
    settings = mine | {"XDG_CACHE_HOME": str(tmp_path)}
    artefacts.configure(route, "2.26.1", settings)
    assert settings == mine | {"XDG_CACHE_HOME": str(tmp_path)}
    assert "mine" in artefacts.said(route, settings)


def test_a_folder_that_cannot_be_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    artefacts.configure(Route.NATIVE, "2.26.1", settings)
    assert len(settings) == 1
    assert "no folder could be made" in artefacts.said(Route.NATIVE, settings)


def test_capabilities() -> None:
    c = CAPABILITIES
    assert c.shapes is ShapePolicy.BUCKETED and c.graph_scope is GraphScope.FORWARD
    assert c.span_mix is SpanMix.SINGLES_APART and c.dtypes == ("bfloat16", "float32")
    assert all(list(sizes) == sorted(set(sizes)) for sizes in (c.token_buckets, c.span_buckets, c.block_buckets))


def test_a_plain_start_compiles_ten_shapes() -> None:
    """Each takes this compiler minutes: the buckets are few for it."""
    limits = Limits(
        max_rows=CAPABILITIES.default_max_rows, max_tokens=CAPABILITIES.default_max_tokens, max_model_len=2048,
        block_size=BLOCK_SIZES[0], num_blocks=1000, vocab_size=1000,
    )  # fmt: skip
    assert len(Padding(CAPABILITIES, limits).shapes()) == 10


def test_an_option_that_there_is_not_is_refused(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.add("torch_xla", "")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    [device] = probe_devices()
    assert device.host and not device.auto and isthmus_capabilities(device).unified_memory
    with pytest.raises(BackendError, match="the neuron backend has no option optlevel; it takes block_buckets"):
        isthmus_open(device, {"optlevel": "1"})


# Block tables that fill 128 partitions.


@given(st.sampled_from((1, 8, 16, 24, *BLOCK_SIZES, 256)), st.integers(1, 200_000))
def test_every_size_proposed_is_a_multiple_of_128_tokens(block_size: int, most_tokens: int) -> None:
    sizes = context_blocks(block_size, most_tokens)
    assert all(size * block_size % PARTITIONS == 0 for size in sizes)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] * block_size >= most_tokens


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_sizes_fill_whole_tiles_with_every_block_size_that_is_taken(block_size: int) -> None:
    assert all(size * block_size % PARTITIONS == 0 for size in CAPABILITIES.block_buckets)


@given(st.integers(1, 700), st.sampled_from(BLOCK_SIZES), st.integers(0, 2**31))
def test_tables_are_padded_to_whole_tiles_and_attention_is_the_same(length: int, block_size: int, seed: int) -> None:
    """Whatever the longest context is."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-length // block_size)
    limits = Limits(
        max_rows=2, max_tokens=8, max_model_len=length, block_size=block_size, num_blocks=2 * blocks + 1, vocab_size=9
    )
    contexts = torch.tensor([length, max(length // 2, 1)], dtype=torch.int32)
    tables = torch.zeros(3, blocks, dtype=torch.int32)
    tables[:2] = torch.arange(1, 2 * blocks + 1, dtype=torch.int32).view(2, blocks)
    rows = torch.tensor([0, 1], dtype=torch.int32)
    empty = torch.zeros(2, dtype=torch.int32)
    inputs = StaticStepInputs(
        token_ids=empty, positions=contexts - 1, slots=empty, span_rows=rows, query_starts=empty,
        context_lengths=contexts, block_tables=tables, sample_tokens=empty, sample_rows=rows, num_tokens=2, num_spans=2,
        num_samples=2, max_query_length=1, max_context_length=length, ints=empty,
        shape=StepShape(2, 2, 2, single=True),
    )  # fmt: skip
    buffer = StepBuffer(torch.device("cpu"), {}, {})
    plans = [layout.plan(inputs, buffer, limits) for layout in (RowLayout(), TiledRowLayout())]
    width = plans[1].tables.shape[1]
    assert width * block_size % PARTITIONS == 0
    assert width * block_size < length + block_size + PARTITIONS
    layer = AttentionSpec(heads=2, kv_heads=1, head_dim=4, scale=0.5)
    keys, values = (torch.randn(limits.num_blocks * block_size, 1, 4, generator=generator) for _ in range(2))
    query = torch.randn(2, 2, 4, generator=generator)
    attended = [
        layout.attend(query, PagedCache(keys, values), layer, plan)
        for layout, plan in zip((RowLayout(), TiledRowLayout()), plans, strict=True)
    ]
    torch.testing.assert_close(*attended)


def test_silu_in_documented_operations_is_silu() -> None:
    gate = torch.tensor([[-200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0]])
    found = DocumentedOps(torch.device("cpu")).gated_activation(torch.cat([gate, gate], dim=-1), "silu")
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * gate)
    assert np.isfinite(found.numpy()).all()


# The engine.


@needs_compiler
@pytest.mark.timeout(TIMEOUT_S)
def test_the_whole_engine_on_the_stand_in(tmp_path: Path) -> None:
    cases = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    found = python(*cases, str(HERE / "stand_in_engine.py"), environment=environment(tmp_path, STAND_IN="neuron"))
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "skipped" not in found.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3 * TIMEOUT_S)
def test_certification_on_the_stand_in(tmp_path: Path) -> None:
    options = [part for setting in FEW for part in ("--backend-option", setting)]
    code, said, err = isthmus(
        "certify", "--device", "neuron", *options, environment=environment(tmp_path), timeout_s=3 * TIMEOUT_S
    )
    assert code == 0, said + err[-3000:]
    assert "CERTIFIED: neuron" in said


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.skipif(not MODEL.exists(), reason="no model file: make model")
def test_a_server_on_the_stand_in_answers(tmp_path: Path) -> None:
    few = ("token_buckets=128", "span_buckets=8", "block_buckets=16")
    options = [part for setting in few for part in ("--backend-option", setting)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(
            sys.executable,
            "-c",
            "from isthmus_server.cli import main; main()",
            "serve",
            str(MODEL),
            "--device",
            "neuron",
        ),
        *("--dtype", "float32", "--port", str(port), "--max-model-len", "512", "--max-num-seqs", "8", *options),
        *("--max-num-batched-tokens", "128"),
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment(tmp_path), stdout=log, stderr=log, cwd=ROOT)
    try:
        said = asked(server, f"http://127.0.0.1:{port}/v1/chat/completions", "What is the capital of France?")
    finally:
        server.terminate()
        server.wait(60)
    assert "Paris" in said, (said, (tmp_path / "log").read_text()[-3000:])


def asked(server: subprocess.Popen[bytes], url: str, question: str) -> str:
    body = {"model": "x", "messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
    models = json.loads(first_answer(server, url.replace("chat/completions", "models"), None))
    body["model"] = models["data"][0]["id"]
    answer = json.loads(first_answer(server, url, json.dumps(body).encode()))
    return str(answer["choices"][0]["message"]["content"])


def first_answer(server: subprocess.Popen[bytes], url: str, body: bytes | None) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + TIMEOUT_S - 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                data: bytes = answer.read()
                return data
        except OSError:
            if time.monotonic() > deadline or server.poll() is not None:
                return b'{"data": [{"id": ""}], "choices": [{"message": {"content": ""}}]}'
            time.sleep(1.0)
