"""The example of a vendor's plugin: small, installed as its own distribution, certified, and serving a model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = sorted(path for path in EXAMPLE.rglob("*") if path.suffix in {".py", ".toml"} and "build" not in path.parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as pip would lay it out, without fetching its build tool: the package and its metadata.

    What pip itself makes of it is in ``test_wheel.py``.
    """
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    package = site / "isthmus_numpy"
    package.mkdir()
    for path in (EXAMPLE / "isthmus_numpy").glob("*.py"):
        (package / path.name).write_text(path.read_text())
    info = site / f"isthmus_numpy-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = project["entry-points"]["isthmus.backends"]
    (info / "entry_points.txt").write_text(
        "[isthmus.backends]\n" + "".join(f"{name} = {module}\n" for name, module in entries.items())
    )
    return site


def environment(site: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}


def test_it_is_under_four_hundred_lines() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) < 400


def test_it_uses_nothing_that_is_not_public() -> None:
    """Of Isthmus: the contract, the hooks, errors, plans, sampling parameters, the reference and the kit."""
    allowed = ("contract", "hookspecs", "errors", "plan", "sampling_params", "reference", "testing.certify")
    for path in FILES:
        for line in path.read_text().splitlines():
            if line.strip().startswith(("from isthmus.", "import isthmus.")):
                module = line.split()[1].removeprefix("isthmus.")
                assert module in allowed, f"{path.name}: {line}"


def test_its_own_tests_certify_it(site: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")],
        env=environment(site),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]


@contextlib.contextmanager
def server(site: Path, *options: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "isthmus_server", "serve", str(MODEL), "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment(site), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 100
        while time.monotonic() < until:
            assert process.poll() is None, process.stdout and process.stdout.read().decode()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.skipif(not MODEL.exists(), reason="the model is not fetched: make model")
def test_it_serves_a_model(site: Path) -> None:
    with server(site, "--device", "numpy", "--max-model-len", "512", "--max-num-seqs", "2") as url:
        body = {"model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"], "temperature": 0, "max_tokens": 8}
        prompt = "The capital of France is"
        answer = httpx.post(f"{url}/v1/completions", json=body | {"prompt": prompt}, timeout=60).json()
        assert "Paris" in answer["choices"][0]["text"], answer
        again = httpx.post(f"{url}/v1/completions", json=body | {"prompt": [prompt, "1, 2, 3, 4,"]}, timeout=60).json()
        first, second = (choice["text"] for choice in again["choices"])
        assert first == answer["choices"][0]["text"] and " 5, 6" in second
