"""Start and end of the server process, and what happens to it in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

SLOW = ("--backend-option", "step_s=0.02", "--backend-option", "eos_every=0")
LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any], started: asyncio.Event | None = None) -> str:
    pieces = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for piece in response.aiter_text():
            pieces.append(piece)
            if started is not None:
                started.set()
    return "".join(pieces)


def last_frame(text: str) -> str:
    return text.strip().rpartition("\n\n")[2].removeprefix("data: ")


def test_a_killed_engine_is_told_to_every_client(start_server: Any) -> None:
    server = start_server(*SLOW)

    async def scene() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=20, limits=limits) as client:
            begun = [asyncio.Event() for _ in range(32)]
            streams = [asyncio.create_task(read_stream(client, LONG, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            os.kill(server.engine_pid(), signal.SIGKILL)
            killed = time.monotonic()
            for text in await asyncio.gather(*streams):
                assert json.loads(last_frame(text))["error"]["code"] == "engine_dead"
            assert time.monotonic() - killed < 2
            assert (await client.get("/livez")).status_code == 503
            assert time.monotonic() - killed < 3

    asyncio.run(scene())
    assert server.wait() == 1
    errors = [line for line in server.text().splitlines() if "ERROR" in line]
    assert len(errors) == 1 and "engine" in errors[0], server.text()
    assert "Traceback" not in server.text()


def test_a_stopped_engine_fails_liveness_until_it_goes_on(start_server: Any) -> None:
    server = start_server(*SLOW, "--stuck-after-s", "1")
    engine = psutil.Process(server.engine_pid())

    async def scene() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            begun = asyncio.Event()
            stream = asyncio.create_task(read_stream(client, {**LONG, "max_tokens": 100}, begun))
            await begun.wait()
            engine.suspend()
            stopped = time.monotonic()
            assert (await client.get("/livez")).status_code == 200
            while (await client.get("/livez")).status_code == 200:
                assert time.monotonic() - stopped < 5
                await asyncio.sleep(0.05)
            assert time.monotonic() - stopped > 0.5
            engine.resume()
            assert last_frame(await stream) == "[DONE]"
            assert (await client.get("/livez")).status_code == 200

    try:
        asyncio.run(scene())
    finally:
        engine.resume()
    server.terminate()
    assert server.wait() == 0


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start_server: Any) -> None:
    server = start_server(*SLOW)

    async def scene() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            begun = asyncio.Event()
            stream = asyncio.create_task(read_stream(client, {**LONG, "max_tokens": 60}, begun))
            whole = asyncio.create_task(
                client.post("/v1/completions", json={**LONG, "max_tokens": 60, "stream": False})
            )
            await begun.wait()
            server.terminate()
            while (await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.01)
            assert (await client.get("/livez")).status_code == 200
            late = await client.post("/v1/completions", json=LONG)
            assert late.status_code == 503
            assert late.headers["connection"] == "close" and int(late.headers["retry-after"]) > 0
            assert last_frame(await stream) == "[DONE]"
            assert (await whole).json()["usage"]["completion_tokens"] == 60

    asyncio.run(scene())
    assert server.wait() == 0
    assert "Shutdown complete." in server.text()


def test_in_the_grace_period_requests_are_still_taken(start_server: Any) -> None:
    server = start_server("--drain-grace-s", "0.8")
    with httpx.Client(base_url=server.url, timeout=10) as client:
        server.terminate()
        while client.get("/readyz").status_code == 200:
            time.sleep(0.01)
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert server.wait() == 0


@pytest.mark.parametrize("second", [False, True])
def test_what_does_not_finish_in_time_is_cut(start_server: Any, second: bool) -> None:
    server = start_server(*SLOW, "--shutdown-timeout-s", "20" if second else "0.3")

    async def scene() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            begun = asyncio.Event()
            stream = asyncio.create_task(read_stream(client, LONG, begun))
            await begun.wait()
            server.terminate()
            if second:
                server.wait_log("Shutting down")
                server.process.send_signal(signal.SIGINT)
            asked = time.monotonic()
            assert json.loads(last_frame(await stream))["error"]["code"] == "shutdown"
            assert time.monotonic() - asked < 5

    asyncio.run(scene())
    assert server.wait(10) == (1 if second else 0)


def test_a_signal_while_loading_ends_at_once(start_server: Any) -> None:
    server = start_server(ready=False)
    while not psutil.Process(server.process.pid).children():
        time.sleep(0.01)
    server.terminate()
    assert server.wait(10) in (0, -signal.SIGTERM)  # the second before there is a handler
    assert "Traceback" not in server.text()


def test_the_line_comes_when_a_request_would_be_answered(start_server: Any) -> None:
    server = start_server("--host", "0.0.0.0", ready=False).wait_ready()
    assert "no --api-key is set" in server.text()
    with httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        assert client.get("/readyz").status_code == 200
    assert server.text().count("Application startup complete.") == 1


def test_sockets_are_local_and_private(server: Any) -> None:
    process = psutil.Process(server.process.pid)
    listening = [
        connection
        for part in (process, *process.children(recursive=True))
        for connection in part.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    assert len(listening) == 1


def test_a_unix_socket(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    server = start_server("--uds", str(path), ready=False)
    server.wait_log("Application startup complete.")
    assert path.stat().st_mode & 0o777 == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://isthmus") as client:
        assert client.get("/v1/models").status_code == 200
    server.terminate()
    assert server.wait() == 0
    assert not path.exists()


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus_server", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("isthmus: ")
    return lines[0]


def test_a_port_in_use_is_told_before_the_model_is_looked_at(toy_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        started = time.monotonic()
        line = one_line(serve("/no/such/model", "--device", "null", "--port", port))
        assert port in line and "in use" in line and "--port" in line
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/no/such/model",), ("/no/such/model",)),
        (("{model}", "--device", "nowhere"), ("nowhere",)),
        (("{model}", "--device", "null", "--backend-option", "nonsense=1"), ("nonsense",)),
        (("{model}", "--device", "null", "--host", "256.256.256.256"), ("--host",)),
        (("{model}", "--device", "null", "--api-key-file", "/no/such/file"), ("--api-key-file",)),
        (("{model}", "--device", "null", "--api-key", ""), ("key",)),
        (("{model}", "--device", "null", "--chat-template", "/no/such/file"), ("--chat-template",)),
        (("{model}", "--device", "null", "--uds", "/no/such/folder/socket"), ("--uds",)),
    ],
)
def test_bad_input_is_one_line(toy_model: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    given = [argument.replace("{model}", str(toy_model)) for argument in arguments]
    line = one_line(serve(*given, "--port", "0"))
    for word in words:
        assert word in line


@pytest.mark.parametrize("load_s", ["0", "20"])
def test_a_bad_tokenizer_is_told_without_waiting_for_the_weights(toy_model: Path, tmp_path: Path, load_s: str) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((toy_model / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    started = time.monotonic()
    line = one_line(serve(str(tmp_path), "--device", "null", "--backend-option", f"load_s={load_s}", "--port", "0"))
    assert "tokenizer" in line
    assert time.monotonic() - started < 15


def test_keys_come_from_a_file_and_from_the_environment(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("key-one\n\n key-two \n")
    server = start_server("--api-key-file", str(path), env={"ISTHMUS_API_KEY": "key-three"})
    with httpx.Client(base_url=server.url) as client:
        for key, status in (("key-one", 200), ("key-two", 200), ("key-three", 200), ("key-four", 401)):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status
        assert client.get("/readyz").status_code == 200
    assert "key-" not in server.text()
