"""The Gaudi backend: found or not in one line, its settings, and the whole engine on a stand-in for its device."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from isthmus.contract import BlockCount, GraphScope, ShapePolicy, SpanMix
from isthmus.errors import BackendUnavailable
from isthmus_gaudi import sdk
from isthmus_gaudi.capabilities import CAPABILITIES
from isthmus_gaudi.probe import probe_devices

HERE = Path(__file__).parent
STAND_INS = HERE.parent / "stand_ins"
MODEL = HERE.parents[1] / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
FEW = {"token_buckets": "256", "span_buckets": "8", "block_buckets": "8,32"}
TIMEOUT_S = 900
CERTIFY_TIMEOUT_S = 3600

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for the fake device"
)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """The stand-in's process: torch's kernel for `index_reduce` says on the CPU, and there alone, that it is new."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PT_HPU_")}
    path = os.pathsep.join(map(str, (STAND_INS, STAND_INS / "gaudi", HERE)))
    return kept | {
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore:index_reduce:UserWarning",
        "ISTHMUS_CACHE": str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "2",
        **more,
    }


def python(*arguments: str, environment: dict[str, str], timeout: int = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def isthmus(*arguments: str, environment: dict[str, str], timeout: int = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    command = ("-c", "from isthmus_server.cli import main; main()", *arguments)
    return python(*command, environment=environment, timeout=timeout)


# Found, or not.


def test_without_the_bridge_one_line_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "stand_ins" not in entry])
    before = set(sys.modules)
    with pytest.raises(BackendUnavailable) as raised:
        probe_devices()
    said = str(raised.value)
    assert "habana-torch-plugin" in said and "not on PyPI" in said and "install" in said and "\n" not in said
    assert not any(name.startswith("habana_frameworks") for name in set(sys.modules) - before)


@needs_compiler
def test_what_isthmus_backends_prints(tmp_path: Path) -> None:
    there = isthmus("backends", environment=environment(tmp_path, COLUMNS="200"))
    assert there.returncode == 0, there.stderr
    line = next(line for line in there.stdout.splitlines() if line.startswith("gaudi"))
    assert "0: Intel Gaudi" in line


@needs_compiler
def test_the_bridge_without_a_device_says_what_to_look_at(tmp_path: Path) -> None:
    code = "from isthmus_gaudi.probe import probe_devices; probe_devices()"
    found = python("-c", code, environment=environment(tmp_path, FAKE_DEVICE_COUNT="0"))
    assert "finds no Gaudi; see what hl-smi says" in found.stderr.strip().splitlines()[-1]


def test_lazy_mode_is_refused_with_the_remedy() -> None:
    with pytest.raises(BackendUnavailable, match=r"PT_HPU_LAZY_MODE is 1.*unset the variable, or set it to 0"):
        sdk.configure({sdk.LAZY_MODE: "1"})


def test_the_settings_are_made_before_the_bridge_is_imported(tmp_path: Path) -> None:
    """By a bridge that says what it sees, and then that it is for another torch."""
    folder = tmp_path / "bridge/habana_frameworks/torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "import os\nprint(os.environ['PT_HPU_LAZY_MODE'], os.environ['PT_HPU_RECIPE_CACHE_CONFIG'])\n"
        "assert False, 'Compile-time PyTorch\\nversion 2.6'\n"
    )
    code = "from isthmus_gaudi.probe import probe_devices; probe_devices()"
    found = python("-c", code, environment=environment(tmp_path, PYTHONPATH=str(tmp_path / "bridge")))
    mode, _, cache = found.stdout.strip().partition(" ")
    assert mode == "0"
    where, delete, megabytes = cache.split(",")
    assert Path(where).is_dir() and Path(where).is_relative_to(tmp_path / "cache/isthmus/gaudi")
    assert (delete, megabytes) == ("false", str(sdk.RECIPE_CACHE_MB))
    last = found.stderr.strip().splitlines()[-1]
    assert "cannot be imported (AssertionError: Compile-time PyTorch version 2.6)" in last


# Settings.


def test_recipes_are_kept_for_each_release_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"habana-torch-plugin": "1.22.0", "torch": "2.7.1"}
    monkeypatch.setattr(sdk, "version", versions.__getitem__)
    surroundings = {"XDG_CACHE_HOME": str(tmp_path)}
    sdk.configure(surroundings)
    assert surroundings[sdk.RECIPE_CACHE] == f"{tmp_path}/isthmus/gaudi/recipes-1.22.0-torch-2.7.1,false,16384"
    assert (tmp_path / "isthmus/gaudi/recipes-1.22.0-torch-2.7.1").stat().st_mode & 0o777 == 0o700
    before = sdk.recipe_folder(surroundings)
    versions["habana-torch-plugin"] = "1.23.0"
    assert sdk.recipe_folder(surroundings) != before


def test_what_the_user_has_set_stands() -> None:
    surroundings = {sdk.RECIPE_CACHE: "/mine,true,100", sdk.LAZY_MODE: "0"}
    sdk.configure(surroundings)
    assert surroundings == {sdk.RECIPE_CACHE: "/mine,true,100", sdk.LAZY_MODE: "0"}
    assert "/mine" in sdk.recipe_cache_said(surroundings)


@pytest.mark.parametrize("name", ["a,b", "file"])
def test_without_a_usable_folder_there_is_no_cache_and_it_says_so(tmp_path: Path, name: str) -> None:
    if name == "file":
        (tmp_path / name).write_text("")
    surroundings = {"XDG_CACHE_HOME": str(tmp_path / name)}
    sdk.configure(surroundings)
    assert sdk.RECIPE_CACHE not in surroundings
    assert "cannot be used; set XDG_CACHE_HOME" in sdk.recipe_cache_said(surroundings)


def test_capabilities() -> None:
    c = CAPABILITIES
    assert c.shapes is ShapePolicy.BUCKETED and c.graph_scope is GraphScope.FORWARD
    assert c.blocks_counted is BlockCount.ALL_ROWS and c.span_mix is SpanMix.SINGLES_APART
    assert all(list(sizes) == sorted(set(sizes)) for sizes in (c.token_buckets, c.span_buckets, c.block_buckets))


# The engine.


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(
    "cases", [("stand_in_engine.py",), ("gaudi_engine.py", "-p", "stand_in_engine")], ids=["as others", "its own"]
)
def test_the_whole_engine_on_the_stand_in(tmp_path: Path, cases: tuple[str, ...]) -> None:
    run = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore:index_reduce:UserWarning")
    file, *options = cases
    found = python(*run, *options, str(HERE / file), environment=environment(tmp_path, STAND_IN="gaudi"))
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "skipped" not in found.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(CERTIFY_TIMEOUT_S)
def test_the_stand_in_is_certified(tmp_path: Path) -> None:
    settings = [f"--backend-option={name}={value}" for name, value in FEW.items()]
    found = isthmus(
        "certify",
        "--device",
        "gaudi",
        *settings,
        "--json",
        environment=environment(tmp_path),
        timeout=CERTIFY_TIMEOUT_S,
    )
    report = json.loads(found.stdout)
    assert report["certified"], [*report["failures"], report["verdict"]]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.skipif(not MODEL.exists(), reason="`make model` fetches it")
def test_a_real_model_answers_over_http(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    buckets = {"token_buckets": "64", "span_buckets": "2", "block_buckets": "8"}
    settings = [f"--backend-option={name}={value}" for name, value in buckets.items()]
    # In 16 bits its two likeliest first tokens are equals.
    limits = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"]
    command = [sys.executable, "-c", "from isthmus_server.cli import main; main()", "serve", str(MODEL)]
    with subprocess.Popen(
        [*command, "--device", "gaudi", "--port", str(port), *limits, *settings], env=environment(tmp_path)
    ) as server:
        try:
            wait_until_ready(server, port)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=TIMEOUT_S) as client:
                question = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
                model = client.get("/models").json()["data"][0]["id"]
                asked = {"model": model, "max_tokens": 16, "temperature": 0.0, **question}
                answer = client.post("/chat/completions", json=asked).json()
        finally:
            server.terminate()
    assert "Paris" in answer["choices"][0]["message"]["content"], answer


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(f"the server was not ready; its exit status is {server.poll()}")
