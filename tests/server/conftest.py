"""A real server over the null backend, and an application over an engine that tests script."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from isthmus.config import EngineOptions, ModelOptions
from isthmus.engine.messages import AddRequest, EngineReady, EngineStats, FinishReason, TokensOut
from isthmus.errors import EngineDead
from isthmus.model.source import resolve_model
from isthmus.testing.toy_model import VOCAB_SIZE, write_toy_model
from isthmus.text.tokenizer import Tokenizer
from isthmus_server.app import create_app
from isthmus_server.service import Service
from isthmus_server.settings import ServerSettings

READY_LINE = "Application startup complete."


class RunningServer:
    """``isthmus serve`` in a process of its own."""

    def __init__(self, model: Path, log: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "isthmus_server", "serve", str(model), "--device", "null", "--port", "0"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, "--served-model-name", "toy", *arguments],
                stderr=stream,
                stdout=stream,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
            )
        self.url = ""

    def wait_ready(self, timeout_s: float = 30.0) -> RunningServer:
        self.wait_log(READY_LINE, timeout_s)
        found = re.search(r"Serving on (http://\S+)", self.text().replace("0.0.0.0", "127.0.0.1"))
        assert found is not None
        self.url = found[1]
        return self

    def wait_log(self, text: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.text()}"
            if self.process.poll() is not None and text not in self.text():
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.text()}")
            time.sleep(0.02)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def engine_pid(self) -> int:
        (child,) = [
            process
            for process in psutil.Process(self.process.pid).children()
            if "isthmus.engine.process" in " ".join(process.cmdline())
        ]
        return int(child.pid)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def start_server(toy_model: Path, tmp_path: Path) -> Iterator[StartServer]:
    started: list[RunningServer] = []

    def start(*arguments: str, ready: bool = True, env: dict[str, str] | None = None) -> RunningServer:
        server = RunningServer(toy_model, tmp_path / f"server{len(started)}.log", *arguments, env=env)
        started.append(server)
        return server.wait_ready() if ready else server

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def server(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was."""
    running = RunningServer(toy_model, tmp_path_factory.mktemp("server") / "server.log").wait_ready()
    yield running
    assert running.process.poll() is None, f"the server ended:\n{running.text()}"
    running.terminate()
    assert running.wait() == 0, running.text()


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


class ScriptedEngine:
    """Answers with the bytes of ``text``, one a turn of the loop; what else happens is set by a test."""

    def __init__(self, text: str = "hello") -> None:
        self.text = text
        self.refusal: Exception | None = None
        self.dies_after = -1
        self.error_after = -1
        self.delay_s = 0.0
        self.requests: list[AddRequest] = []
        self.aborted: list[int] = []
        self.alive = True
        self.stats: EngineStats | None = EngineStats(monotonic_s=time.monotonic(), last_progress_s=time.monotonic())
        self.ready = EngineReady(
            model_name="toy",
            vocab_size=VOCAB_SIZE,
            max_model_len=4096,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            max_waiting=16,
            block_size=16,
            num_blocks=100,
            eos_token_ids=(257,),
            backend="scripted",
            device_name="none",
            dtype="none",
            providers={},
        )
        self._ids = 0

    def next_request_id(self) -> int:
        self._ids += 1
        return self._ids

    async def generate(self, request: AddRequest) -> AsyncGenerator[TokensOut, None]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        tokens = self.text.encode()[: request.sampling.max_tokens]
        complete = False
        try:
            for index, token in enumerate(tokens):
                await asyncio.sleep(self.delay_s)
                if index == self.dies_after:
                    raise EngineDead("scripted")
                if index == self.error_after:
                    yield TokensOut(request_id=request.request_id, finish_reason=FinishReason.ERROR, error="a NaN")
                    return
                last = index == len(tokens) - 1
                yield TokensOut(
                    request_id=request.request_id,
                    tokens=(token,),
                    finish_reason=FinishReason.LENGTH if last else None,
                    num_cached_tokens=0 if index == 0 else -1,
                )
            complete = True
        finally:
            if not complete:
                self.aborted.append(request.request_id)

    async def shutdown(self) -> None:
        self.alive = False

    async def wait_dead(self) -> str:
        await asyncio.Event().wait()
        return ""


@pytest.fixture(scope="session")
def tokenizer(toy_model: Path) -> Tokenizer:
    return Tokenizer.load(resolve_model(str(toy_model)))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def make_service(engine: ScriptedEngine, tokenizer: Tokenizer) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(*, opened: bool = True, **settings: Any) -> Service:
        options = EngineOptions(model=ModelOptions(model="toy"))
        service = Service(ServerSettings(engine=options, **settings))
        if opened:
            service.open(engine, tokenizer)
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


@pytest.fixture
async def client(make_service: Callable[..., Service]) -> Any:
    """An httpx client of an application over :class:`ScriptedEngine`."""
    async with app_client(make_service()) as found:
        yield found


def app_client(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10)


def events(body: str) -> list[dict[str, Any]]:
    """The events of a finished stream; its last frame must be [DONE] or an error."""
    frames = [frame.removeprefix("data: ") for frame in body.split("\n\n") if frame]
    assert frames, "an empty stream"
    if frames[-1] == "[DONE]":
        return [json.loads(frame) for frame in frames[:-1]]
    found = [json.loads(frame) for frame in frames]
    assert "error" in found[-1], f"the stream ends in {frames[-1]!r}"
    return found


@pytest.fixture(name="app_client")
def _app_client() -> Callable[[Service], httpx.AsyncClient]:
    return app_client


@pytest.fixture(name="events")
def _events() -> Callable[[str], list[dict[str, Any]]]:
    return events
