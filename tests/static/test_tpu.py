"""The TPU backend: found or not in one line, its settings, and the whole engine on a stand-in for torch_tpu."""

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

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from isthmus.contract import GraphScope, ShapePolicy, SpanMix
from isthmus.errors import BackendUnavailable
from isthmus_tpu import artefacts, hardware, probe, sdk
from isthmus_tpu.capabilities import CAPABILITIES
from isthmus_tpu.memory import held_bytes
from isthmus_tpu.sdk import Route, Sdk

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STAND_INS = HERE.parent / "stand_ins"
MODEL = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT_S = 600
FEW = ("token_buckets=256", "span_buckets=8", "block_buckets=8")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for the fake device"
)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(STAND_INS), str(STAND_INS / "tpu")]),
        # Torch's kernel for `index_reduce` says on the CPU, and there alone, that it is new.
        "PYTHONWARNINGS": "ignore:index_reduce:UserWarning",
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


def line_of_tpu(listed: str) -> str:
    return next(line for line in listed.splitlines() if line.startswith("tpu"))


# Found, or not.


def test_without_software_one_line_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk, "_has", lambda module: False)
    with pytest.raises(BackendUnavailable) as raised:
        probe.probe_devices()
    said = str(raised.value)
    assert "[tpu]" in said and "[tpu-xla]" in said and "\n" not in said


@needs_compiler
def test_what_isthmus_backends_prints(tmp_path: Path) -> None:
    code, there, err = isthmus("backends", environment=environment(tmp_path, COLUMNS="200"))
    assert code == 0, err
    assert "0: Google TPU v6e, 8 GiB" in line_of_tpu(there)
    _, none, _ = isthmus("backends", environment=environment(tmp_path, COLUMNS="400", FAKE_DEVICE_COUNT="0"))
    assert "finds no TPU" in line_of_tpu(none) and "/dev/vfio" in line_of_tpu(none)


def test_a_torch_tpu_for_another_torch_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "other/torch_tpu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('undefined symbol:\\n _ZN5torch')\n")
    code = "from isthmus_tpu.probe import probe_devices; probe_devices()"
    found = python("-c", code, environment=environment(tmp_path, PYTHONPATH=str(tmp_path / "other")))
    last = found.stderr.strip().splitlines()[-1]
    assert "cannot be imported (ImportError: undefined symbol: _ZN5torch)" in last and "torch 2.11" in last


@pytest.mark.parametrize(
    ("installed", "setting", "route", "reason"),
    [
        ({"torch_tpu"}, {}, Route.TORCH_TPU, "has a device of its own"),
        ({"torch_tpu", "torch_xla"}, {}, Route.TORCH_TPU, "torch_xla is installed too and not used"),
        ({"torch_xla"}, {}, Route.TORCH_XLA, "torch_tpu is not"),
        ({"torch_xla"}, {"PJRT_DEVICE": "CPU"}, Route.TORCH_XLA, "no TPU is used"),
    ],
)
def test_the_route_is_what_is_installed_and_says_why(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], setting: dict[str, str], route: Route, reason: str
) -> None:
    monkeypatch.setattr(sdk, "_has", lambda module: module in installed)
    found = sdk.find(setting)
    assert (found.route, found.rehearsal) == (route, bool(setting))
    assert reason in found.reason


def pci(root: Path, *ids: tuple[str, str]) -> Path:
    for index, (vendor, device) in enumerate(ids):
        folder = root / hardware.DEVICES / f"0000:00:{index:02x}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    return root


def test_the_older_route_counts_on_the_pci_bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sdk, "_has", lambda module: module == "torch_xla")
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(BackendUnavailable, match="the PCI bus has no TPU"):
        probe.probe_devices(pci(tmp_path / "none", ("0x10de", "0x2330"), ("0x1ae0", "0x0042")))
    there = pci(tmp_path / "two", ("0x1ae0", "0x006f"), ("0x10de", "0x2330"), ("0x1ae0", "0x0076"))
    with pytest.raises(BackendUnavailable, match="without libtpu"):
        probe.probe_devices(there)
    find_spec = probe.importlib.util.find_spec
    monkeypatch.setattr(
        probe.importlib.util, "find_spec", lambda name: find_spec("torch" if name == "libtpu" else name)
    )
    found = probe.probe_devices(there)
    assert [(device.index, device.name, device.memory_bytes // 2**30) for device in found] == [
        (0, "Google TPU v6e", 32),
        (1, "Google TPU7x", 96),
        (2, "Google TPU7x", 96),
    ]


# Settings.


def test_programs_are_kept_for_each_pair_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"libtpu": "0.0.52"}
    monkeypatch.setattr(artefacts, "version_of", versions.__getitem__)
    found = Sdk(route=Route.TORCH_TPU, version="0.2.0", reason="")
    settings = {"XDG_CACHE_HOME": str(tmp_path)}
    artefacts.configure(found, settings)
    folder = tmp_path / "isthmus/tpu/torch_tpu-0.2.0-libtpu-0.0.52"
    assert settings[artefacts.ROOT] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    versions["libtpu"] = "0.0.53"
    assert artefacts.folder_of(found, settings) != folder


def test_what_the_user_has_set_stands_and_an_unusable_folder_is_left_alone(tmp_path: Path) -> None:
    found = Sdk(route=Route.TORCH_TPU, version="0.2.0", reason="")
    mine = {artefacts.ROOT: "/mine"}
    artefacts.configure(found, mine)
    assert mine == {artefacts.ROOT: "/mine"}
    (tmp_path / "file").write_text("")
    none = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    artefacts.configure(found, none)
    assert artefacts.ROOT not in none


def test_memory_held_is_that_of_tensors_with_numbers() -> None:
    before = held_bytes("cpu")
    numbers = torch.zeros(2**20)
    with FakeTensorMode():
        kept_by_a_compiler = torch.zeros(2**28)
    views = [numbers[1:], numbers.view(2, -1)]
    assert kept_by_a_compiler.device.type == "cpu" and len(views) == 2
    assert held_bytes("cpu") - before == numbers.nbytes


def test_capabilities() -> None:
    c = CAPABILITIES
    assert c.shapes is ShapePolicy.BUCKETED and c.graph_scope is GraphScope.FORWARD
    assert c.span_mix is SpanMix.SINGLES_APART and c.dtypes[0] == "bfloat16"
    assert all(list(sizes) == sorted(set(sizes)) for sizes in (c.token_buckets, c.span_buckets, c.block_buckets))


# The engine.


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_the_whole_engine_on_the_stand_in(tmp_path: Path) -> None:
    cases = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore:index_reduce:UserWarning")
    found = python(*cases, str(HERE / "stand_in_engine.py"), environment=environment(tmp_path, STAND_IN="tpu"))
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "skipped" not in found.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3 * TIMEOUT_S)
def test_certification_on_the_stand_in(tmp_path: Path) -> None:
    options = [part for setting in FEW for part in ("--backend-option", setting)]
    code, said, err = isthmus(
        "certify", "--device", "tpu", *options, environment=environment(tmp_path), timeout_s=3 * TIMEOUT_S
    )
    assert code == 0, said + err[-3000:]
    assert "CERTIFIED: tpu" in said


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
        *(sys.executable, "-c", "from isthmus_server.cli import main; main()", "serve", str(MODEL), "--device", "tpu"),
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
