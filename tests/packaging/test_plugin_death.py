"""A server whose device is a plugin, and the plugin's process ends in the middle of a step: every client is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from isthmus.testing.tiny_model import write_tiny_model

PLUGIN = """
import os
import torch
from isthmus.contract import DeviceInfo
from isthmus.hookspecs import hookimpl
from isthmus.reference import ReferenceBackend, ReferenceSampling

CONTRACT_VERSION = (1, 0)


class Deadly(ReferenceSampling):
    def sample(self, logits, inputs, device, state, num_logprobs):
        if bool((device.tokens[inputs.sample_rows.long(), 0] == ord("!")).any()):
            os._exit(7)
        return super().sample(logits, inputs, device, state, num_logprobs)


@hookimpl
def isthmus_probe():
    return [DeviceInfo(backend="deadly", index=0, name="cpu", auto=False)]


@hookimpl
def isthmus_open(device, options):
    return ReferenceBackend(name="deadly", sampling=Deadly(torch.device("cpu")))
"""
LONG = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}


class Server:
    def __init__(self, folder: Path) -> None:
        site = folder / "site"
        info = site / "deadly_plugin-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "deadly.py").write_text(PLUGIN)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[isthmus.backends]\ndeadly = deadly\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        command = [sys.executable, "-m", "isthmus_server", "serve", str(write_tiny_model(folder / "model")),
                   "--device", "deadly", "--dtype", "float32", "--port", str(port), "--max-num-seqs", "4",
                   "--max-num-batched-tokens", "64", "--kv-cache-memory", "64MiB"]  # fmt: skip
        with self.log.open("wb") as log:
            environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"it never became ready:\n{self.log.read_text()}")

    def engine_pid(self) -> int:
        [engine] = psutil.Process(self.process.pid).children()
        return int(engine.pid)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)


async def kill(server: Server, client: httpx.AsyncClient) -> None:
    os.kill(server.engine_pid(), signal.SIGKILL)


async def ask_for_death(server: Server, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "!", "max_tokens": 4})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"


async def last_frame(client: httpx.AsyncClient, begun: asyncio.Event) -> str:
    """Of a long stream; ``begun`` is set when its first has come."""
    last = ""
    async with client.stream("POST", "/v1/completions", json=LONG) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                last = line.removeprefix("data: ")
                begun.set()
    return last


@pytest.mark.parametrize(
    ("end", "how"), [(kill, "by signal 9"), (ask_for_death, "with exit status 7")], ids=["killed", "ends itself"]
)
def test_the_end_of_a_plugins_process_is_told(server: Server, end: Callable[..., object], how: str) -> None:
    async def scene() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            begun = [asyncio.Event() for _ in range(3)]
            streams = [asyncio.create_task(last_frame(client, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            ended_s = time.monotonic()
            await end(server, client)  # type: ignore[misc]
            for last in await asyncio.gather(*streams):
                assert json.loads(last)["error"]["code"] == "engine_dead"
            for path in ("/readyz", "/livez"):
                assert (await client.get(path)).status_code == 503
            refused = await client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert time.monotonic() - ended_s < 5

    asyncio.run(scene())
    assert server.process.wait(10) == 1
    errors = [line for line in server.log.read_text().splitlines() if "ERROR" in line]
    assert len(errors) == 1 and how in errors[0], server.log.read_text()
    assert "Traceback" not in server.log.read_text()
