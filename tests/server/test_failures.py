"""What a client sees when the engine refuses, fails or ends: scripted, so that each moment can be had."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from isthmus.engine.messages import EngineStats
from isthmus.errors import InvalidRequest, QueueFull
from isthmus_server import gate
from isthmus_server.api_error import unavailable
from isthmus_server.app import create_app
from isthmus_server.lifecycle import Phase
from isthmus_server.service import Service

Events = Callable[[str], list[dict[str, Any]]]
MakeService = Callable[..., Service]
AppClient = Callable[[Service], httpx.AsyncClient]
CHAT = {"messages": [{"role": "user", "content": "x"}]}
BOTH = pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)])


@BOTH
async def test_the_engines_death_in_a_stream_is_an_error_event(
    client: httpx.AsyncClient, engine: Any, events: Events, path: str, body: dict[str, Any]
) -> None:
    engine.dies_after = 3
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    last = events(answer.text)[-1]
    assert last["error"]["code"] == "engine_dead" and set(last["error"]) == {"message", "type", "param", "code"}
    whole = await client.post(path, json=body)
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "engine_dead"


@BOTH
async def test_a_failed_request_is_an_error(
    client: httpx.AsyncClient, engine: Any, events: Events, path: str, body: dict[str, Any]
) -> None:
    engine.error_after = 2
    found = events((await client.post(path, json={**body, "stream": True})).text)
    assert found[-1]["error"]["message"] == "a NaN"
    assert not any(choice.get("finish_reason") for event in found[:-1] for choice in event["choices"])
    assert (await client.post(path, json=body)).status_code == 500
    engine.error_after = 0  # before anything was written there is still a status to give
    assert (await client.post(path, json={**body, "stream": True})).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_says_when_to_come_back(client: httpx.AsyncClient, engine: Any, stream: bool) -> None:
    engine.refusal = QueueFull("16 requests wait already", retry_after_s=2.5)
    answer = await client.post("/v1/completions", json={"prompt": "x", "stream": stream})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["code"] == "queue_full"
    assert (
        'vllm:admission_rejections_total{model_name="toy",reason="queue_full"} 1.0'
        in (await client.get("/metrics")).text
    )


async def test_a_queue_known_to_be_full_costs_the_engine_nothing(client: httpx.AsyncClient, engine: Any) -> None:
    now = time.monotonic()
    engine.stats = EngineStats(monotonic_s=now, last_progress_s=now, num_waiting=engine.ready.max_waiting)
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = await client.post(path, content=b"not even JSON")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_full"
        assert "retry-after" in answer.headers
    assert not engine.requests


async def test_bodies_are_bounded_together(
    make_service: MakeService, app_client: AppClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_BUFFERED_BYTES", 5000)
    async with app_client(make_service()) as client:
        small, large = {"prompt": "x"}, {"prompt": "x", "user": "y" * 200, "metadata": "z" * 6000}
        for _ in range(3):  # what one request held is given back at its end
            assert (await client.post("/v1/completions", json={**large, "metadata": "z" * 3000})).status_code == 200
        assert (await client.post("/v1/completions", json=large)).status_code == 503
        assert (await client.post("/v1/completions", json=small)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_the_callers_fault(
    client: httpx.AsyncClient, engine: Any, stream: bool
) -> None:
    engine.refusal = InvalidRequest("it can never fit", param="prompt")
    answer = await client.post("/v1/completions", json={"prompt": "x", "stream": stream, "n": 3})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


async def test_one_failed_choice_ends_the_others(client: httpx.AsyncClient, engine: Any, events: Events) -> None:
    engine.dies_after = 2
    engine.delay_s = 0.01
    answer = await client.post("/v1/completions", json={"prompt": "x", "n": 4, "stream": True})
    assert "error" in events(answer.text)[-1]
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


async def test_a_fault_of_ours_tells_nothing(client: httpx.AsyncClient, engine: Any, caplog: Any) -> None:
    engine.refusal = RuntimeError("/secret/path and a heap address 0x7f")
    answer = await client.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "find-me"})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    engine.refusal, engine.text = None, "\ud800"  # it cannot be encoded: fails when it is asked for its bytes
    streamed = await client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert streamed.json()["error"]["code"] == "internal_error"
    assert "find-me" in caplog.text and "secret" in caplog.text


async def test_before_the_engine_is_there(make_service: MakeService, app_client: AppClient) -> None:
    async with app_client(make_service(opened=False)) as client:
        assert (await client.get("/livez")).status_code == 200
        for path in ("/readyz", "/health", "/v1/models"):
            assert (await client.get(path)).status_code == 503
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = await client.post(path, json={"prompt": "x"})
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
            assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/metrics")).status_code == 200


async def test_phases_of_the_end(make_service: MakeService, app_client: AppClient, engine: Any) -> None:
    service = make_service()
    expected = {
        # phase: (readyz, livez, a request)
        Phase.READY: (200, 200, 200),
        Phase.GRACE: (503, 200, 200),
        Phase.DRAINING: (503, 200, 503),
        Phase.DEAD: (503, 503, 503),
    }
    async with app_client(service) as client:
        for phase, statuses in expected.items():
            service.lifecycle.phase = phase
            ready, live = await client.get("/readyz"), await client.get("/livez")
            answer = await client.post("/v1/completions", json={"prompt": "x"})
            assert (ready.status_code, live.status_code, answer.status_code) == statuses, phase
            if phase is Phase.DRAINING:
                assert answer.headers["connection"] == "close" and "retry-after" in answer.headers


async def test_stuck_means_work_and_no_progress(make_service: MakeService, app_client: AppClient, engine: Any) -> None:
    service = make_service(stuck_after_s=5.0)
    now = time.monotonic()
    async with app_client(service) as client:
        for running, age_s, live in ((0, 100.0, 200), (1, 1.0, 200), (1, 6.0, 503), (0, 6.0, 200)):
            engine.stats = EngineStats(monotonic_s=now, last_progress_s=now - age_s, num_running=running)
            assert (await client.get("/livez")).status_code == live, (running, age_s)
        engine.stats = EngineStats(monotonic_s=now, last_progress_s=now, num_running=1)
        engine.alive = False
        assert (await client.get("/livez")).status_code == 503


async def drop_after(service: Service, body: bytes, num_frames: int) -> int:
    """Ask, and go away after so many frames of the answer; how many came."""
    gone = asyncio.Event()
    frames = 0
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal frames
        frames += 1
        if frames >= num_frames:
            gone.set()

    if num_frames == 0:
        asyncio.get_running_loop().call_later(0.02, gone.set)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("test", 80),
        "client": ("test", 1),
        "headers": [(b"content-type", b"application/json")],
    }
    async with asyncio.timeout(5):
        await create_app(service)(scope, receive, send)
    return frames


@pytest.mark.parametrize(
    ("options", "num_frames"),
    [
        *[(options, frames) for options in (b'"stream": true', b'"stream": true, "n": 3') for frames in (0, 1, 2, 4)],
        *[(options, 0) for options in (b'"stream": false', b'"n": 2')],
    ],
)
async def test_a_client_that_goes_ends_its_generation(
    make_service: MakeService, engine: Any, options: bytes, num_frames: int
) -> None:
    engine.text = "x" * 500
    engine.delay_s = 0.01
    service = make_service()
    started = time.monotonic()
    await drop_after(service, b'{"prompt": "x", "max_tokens": 500, ' + options + b"}", num_frames)
    assert time.monotonic() - started < 2
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)
    assert engine.requests and not service.lifecycle.running
    assert service.telemetry.aborted["disconnect"] == 1


async def test_cut_requests_hear_why(
    make_service: MakeService, app_client: AppClient, engine: Any, events: Any
) -> None:

    engine.text = "x" * 500
    engine.delay_s = 0.01
    service = make_service()
    async with app_client(service) as client:
        body = {"prompt": "x", "max_tokens": 500}
        streamed = asyncio.create_task(client.post("/v1/completions", json={**body, "stream": True}))
        whole = asyncio.create_task(client.post("/v1/completions", json=body))
        while len(service.lifecycle.running) < 2 or len(engine.requests) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert service.lifecycle.cut_all(unavailable("closing", "shutdown")) == 2
        assert events((await streamed).text)[-1]["error"]["code"] == "shutdown"
        assert (await whole).status_code == 503
    assert len(engine.aborted) == 2
    assert await service.lifecycle.wait_idle(1)
