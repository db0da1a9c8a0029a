"""The engine process and its asyncio client: streams, death of either side, bad messages, heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import uvloop
import zmq

from isthmus.config import BackendOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.engine.client import AsyncEngineClient
from isthmus.engine.local import LocalEngine
from isthmus.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    FinishReason,
    Outputs,
    TokensOut,
    pack_tokens,
)
from isthmus.errors import BackendError, BackendNotFound, EngineDead, InvalidRequest, QueueFull
from isthmus.sampling_params import RowSampling

FAIL = 2


def options(max_waiting: int = 4096, device: str = "null", **null: object) -> EngineOptions:
    return EngineOptions(
        model=ModelOptions(model="toy", max_model_len=512),
        scheduler=SchedulerOptions(max_waiting=max_waiting, max_num_seqs=64),
        backend=BackendOptions(device=device, options={name: str(value) for name, value in null.items()}),
    )


@contextlib.asynccontextmanager
async def engine(**null: Any) -> AsyncIterator[AsyncEngineClient]:
    client = await AsyncEngineClient.start(options(**null), log_level="ERROR")
    try:
        yield client
    finally:
        await client.shutdown()


def request(client: AsyncEngineClient, prompt: bytes = b"hello", max_tokens: int = 16) -> AddRequest:
    return AddRequest(
        request_id=client.next_request_id(),
        prompt=pack_tokens(list(prompt)),
        sampling=RowSampling(max_tokens=max_tokens),
    )


async def collect(client: AsyncEngineClient, added: AddRequest) -> list[TokensOut]:
    return [item async for item in client.generate(added)]


def tokens(items: list[TokensOut]) -> list[int]:
    return [token for item in items for token in item.tokens]


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Wait until something holds; the seconds it took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < timeout_s, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - begun


def is_at_rest(client: AsyncEngineClient) -> bool:
    stats = client.stats
    return (
        stats is not None
        and stats.num_running == stats.num_waiting == 0
        and stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    )


async def test_streams_bring_what_a_local_engine_brings() -> None:
    local = LocalEngine.start(options(), progress=False)
    prompts = [b"prompt %d" % i for i in range(50)]
    async with engine() as client:
        streams = await asyncio.gather(*(collect(client, request(client, prompt)) for prompt in prompts))
        for prompt, items in zip(prompts, streams, strict=True):
            alone = AddRequest(request_id=0, prompt=pack_tokens(list(prompt)), sampling=RowSampling(max_tokens=16))
            assert tokens(items) == tokens(list(local.generate([alone])))
            assert [item.finish_reason for item in items] == [None] * 15 + [FinishReason.LENGTH]
        await until(lambda: is_at_rest(client))
    local.close()


async def test_kill_9_ends_every_open_stream_at_once() -> None:
    async with engine(step_s=0.01) as client:
        streams = [client.generate(request(client, max_tokens=400)) for _ in range(32)]
        for stream in streams:
            await anext(stream)

        async def to_the_end(stream: AsyncIterator[TokensOut]) -> float:
            with pytest.raises(EngineDead, match="by signal 9"):
                async for _ in stream:
                    pass
            return time.monotonic()

        killed_s = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        ended_s = await asyncio.wait_for(asyncio.gather(*map(to_the_end, streams)), 2.0)
        assert max(ended_s) - killed_s < 1.0
        assert "by signal 9" in await asyncio.wait_for(client.wait_dead(), 0.1)
        assert not client.alive
        with pytest.raises(EngineDead, match="by signal 9"):
            await collect(client, request(client))


CLIENT = """
import asyncio, sys, psutil
from isthmus.config import BackendOptions, EngineOptions, ModelOptions
from isthmus.engine.client import AsyncEngineClient
from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.sampling_params import RowSampling

async def main():
    null = {"step_s": sys.argv[2], "load_s": "30" if sys.argv[1] == "loading" else "0"}
    options = EngineOptions(model=ModelOptions(model="toy"), backend=BackendOptions(device="null", options=null))
    if sys.argv[1] == "loading":
        starting = asyncio.ensure_future(AsyncEngineClient.start(options, log_level="ERROR"))
        await asyncio.sleep(1.5)
        [child] = psutil.Process().children()
        print(child.pid, flush=True)
        await asyncio.sleep(60)
    client = await AsyncEngineClient.start(options, log_level="ERROR")
    if sys.argv[1] == "busy":
        stream = client.generate(
            AddRequest(request_id=0, prompt=pack_tokens([1]), sampling=RowSampling(max_tokens=4000))
        )
        if float(sys.argv[2]) < 1:
            await anext(stream)
        else:
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.3)
    print(client.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("state", "step_s"),
    [("idle", 0.0), ("busy", 0.001), ("busy", 30.0), ("loading", 0.0)],
    ids=["idle", "busy", "in-a-long-step", "loading"],
)
async def test_kill_9_of_the_client_ends_the_engine(state: str, step_s: float) -> None:
    with tempfile.TemporaryDirectory() as folder:  # a killed client cannot tidy up
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, state, str(step_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TMPDIR": folder},
        )
        with client:
            assert client.stdout is not None
            pid = int(client.stdout.readline())
            assert is_alive(pid)
            client.kill()
            assert await until(lambda: not is_alive(pid)) < 1.0


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_the_end_of_the_pipe_ends_the_engine_where_the_kernel_does_not() -> None:
    """What serves systems without a signal at the parent's death: its pipe closes, though it lives."""
    client = await AsyncEngineClient.start(options(step_s=30.0), log_level="ERROR")
    stream = client.generate(request(client))
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.2)
    client._process.stdin.close()
    with pytest.raises(EngineDead, match="with exit status 1"):
        await asyncio.wait_for(waiting, 1.0)
    await client.shutdown()


def test_the_client_works_on_uvloop() -> None:
    async def main() -> None:
        async with engine() as client:
            streams = await asyncio.gather(*(collect(client, request(client, max_tokens=50)) for _ in range(50)))
            assert all(len(tokens(items)) == 50 for items in streams)
            stream = client.generate(request(client, max_tokens=400))
            await anext(stream)
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineDead, match="by signal 9"):
                while True:
                    await asyncio.wait_for(anext(stream), 1.0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_death_while_loading_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineDead, match="the engine process ended by signal 9"):
        await asyncio.wait_for(AsyncEngineClient.start(options()), 20)


async def test_cancelling_a_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(30)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(AsyncEngineClient.start(options()), 0.5)
    assert not [child for child in psutil.Process().children() if "isthmus.engine.process" in child.cmdline()]


async def test_the_error_of_a_start_keeps_its_class() -> None:
    with pytest.raises(BackendNotFound, match="no backend 'nul' is installed"):
        await AsyncEngineClient.start(options(device="nul"), log_level="ERROR")
    with pytest.raises(BackendError, match="no option 'speed'"):
        await AsyncEngineClient.start(options(speed=1), log_level="ERROR")


async def test_garbage_on_the_socket_is_dropped(tmp_path: Path) -> None:
    draw = random.Random(7)
    marker = tmp_path / "was-here"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(marker), "w"))

    good = msgspec.msgpack.encode(
        AddRequest(request_id=1 << 40, prompt=b"\0\0\0\0", sampling=RowSampling(max_tokens=1))
    )
    garbage = [
        b"",
        b"\xc1",
        pickle.dumps(Bomb()),
        msgspec.msgpack.encode(["add"]),
        msgspec.msgpack.encode(["add", "one", b"", {}]),
        msgspec.msgpack.encode({"add": 1}),
        msgspec.msgpack.encode(["abort", ["x"]]),
        b"\x91" * 100_000,
        *(draw.randbytes(draw.randint(1, 400)) for _ in range(200)),
        *(good[:cut] for cut in range(len(good))),
    ]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    async with engine() as client:
        before = await collect(client, request(client))
        with context.socket(zmq.PUSH) as socket:
            socket.connect(client._wire.to_engine)
            for message in [*garbage, msgspec.msgpack.encode(EngineFailed(message="not for an engine"))]:
                socket.send(message)
            socket.send_multipart([good, good])
            socket.send(msgspec.msgpack.encode(AbortRequests(request_ids=(1, 2, 3, -5))))
            await asyncio.sleep(0.2)
            assert tokens(await collect(client, request(client))) == tokens(before)
            socket.close(linger=0)
        with context.socket(zmq.PUSH) as socket:  # and at the client's own socket
            socket.connect(client._wire.from_engine)
            for message in garbage:
                socket.send(message)
            await asyncio.sleep(0.2)
            assert tokens(await collect(client, request(client))) == tokens(before)
            socket.close(linger=0)
        assert client.alive and not marker.exists()
    context.term()


async def test_a_failed_step_and_then_failures_in_a_row() -> None:
    async with engine(fail_token=FAIL) as client:
        [bad] = await collect(client, request(client, bytes([40, FAIL])))
        assert bad.finish_reason == FinishReason.ERROR and "a failure that was asked for" in bad.error
        assert len(tokens(await collect(client, request(client)))) == 16
        for _ in range(3):
            await collect(client, request(client, bytes([40, FAIL])))
        with pytest.raises(EngineDead, match="the device failed 3 times in a row"):
            await collect(client, request(client))
        assert "3 times in a row" in await client.wait_dead()


async def test_a_last_item_that_comes_with_the_engines_end_is_delivered() -> None:
    async with engine(step_s=0.5) as client:
        added = request(client)
        reading = asyncio.ensure_future(collect(client, added))
        await asyncio.sleep(0)  # sent, and waiting for its first item
        last = TokensOut(request_id=added.request_id, finish_reason=FinishReason.ERROR, error="its step failed")
        client._take(Outputs(items=(last,)))
        client._take(EngineFailed(message="the device is gone", kind="EngineDead"))
        assert await reading == [last]
        with pytest.raises(EngineDead, match="the device is gone"):
            await collect(client, request(client))


async def test_refusals_have_their_class() -> None:
    async with engine(max_waiting=2, step_s=0.02) as client:
        with pytest.raises(InvalidRequest, match="this model takes at most 512") as raised:
            await collect(client, request(client, b"x" * 600))
        assert raised.value.param == "prompt"
        outcomes = await asyncio.gather(
            *(collect(client, request(client, max_tokens=30)) for _ in range(70)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert refused and all(isinstance(outcome, QueueFull) for outcome in refused)
        assert client.alive
        used = request(client, max_tokens=100)
        stream = client.generate(used)
        await anext(stream)
        with pytest.raises(InvalidRequest, match="is in use"):
            await collect(client, used)
        await stream.aclose()


async def test_a_thousand_disconnects_at_random_moments_leak_nothing() -> None:
    draw = random.Random(8)
    async with engine(step_s=0.001) as client:

        async def visit() -> None:
            added = request(client, bytes(draw.choices(range(32, 127), k=draw.randint(1, 60))), draw.randint(1, 100))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(collect(client, added), draw.random() * 0.05)

        for _ in range(10):
            await asyncio.gather(*(visit() for _ in range(100)))
        await until(lambda: is_at_rest(client), timeout_s=5)
        assert not client._streams and not client._aborts
        assert client.stats is not None and client.stats.prompt_tokens > 0
        assert len(tokens(await collect(client, request(client)))) == 16


async def test_breaking_out_of_a_stream_aborts_it() -> None:
    async with engine(step_s=0.005) as client:
        async with contextlib.aclosing(client.generate(request(client, max_tokens=400))) as stream:
            async for _ in stream:
                break
        assert await until(lambda: is_at_rest(client)) < 1.0


async def test_heartbeats_come_while_a_long_step_runs_and_show_no_progress() -> None:
    async with engine(step_s=2.5) as client:
        running = asyncio.ensure_future(collect(client, request(client, max_tokens=1)))
        await asyncio.sleep(2.2)
        stats = client.stats
        assert stats is not None
        assert time.monotonic() - stats.monotonic_s < 1.5
        assert stats.monotonic_s - stats.last_progress_s > 0.8
        await running
        await until(lambda: is_at_rest(client))
        await asyncio.sleep(1.2)
        assert client.stats is not None
        assert time.monotonic() - client.stats.monotonic_s < 1.5
        assert client.stats.monotonic_s == client.stats.last_progress_s  # nothing to do is no lack of progress


async def test_an_idle_engine_sleeps() -> None:
    async with engine() as client:
        await collect(client, request(client))
        process = psutil.Process(client.pid)
        before = process.cpu_times()
        await asyncio.sleep(1.5)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.1


async def test_a_stopped_engine_looks_stuck_and_recovers() -> None:
    async with engine() as client:
        await until(lambda: client.stats is not None)
        os.kill(client.pid, signal.SIGSTOP)
        running = asyncio.ensure_future(collect(client, request(client)))
        await asyncio.sleep(1.5)
        assert client.stats is not None and time.monotonic() - client.stats.monotonic_s > 1.2
        assert not running.done()
        os.kill(client.pid, signal.SIGCONT)
        assert len(tokens(await asyncio.wait_for(running, 2))) == 16


async def test_shutdown_ends_a_stopped_engine_too_and_open_streams() -> None:
    client = await AsyncEngineClient.start(options(step_s=0.01), log_level="ERROR")
    stream = client.generate(request(client, max_tokens=400))
    await anext(stream)
    os.kill(client.pid, signal.SIGSTOP)
    await client.shutdown(timeout_s=0.2)
    with pytest.raises(EngineDead, match="was shut down"):
        async for _ in stream:
            pass
    assert await client.wait_dead() == "the engine was shut down"
    assert not client._wire.folder.exists()
    await client.shutdown()
    with pytest.raises(EngineDead, match="was shut down"):
        await collect(client, request(client))


async def test_shutdown_is_quick_and_leaves_nothing() -> None:
    client = await AsyncEngineClient.start(options(), log_level="ERROR")
    await collect(client, request(client))
    begun = time.monotonic()
    await client.shutdown()
    assert time.monotonic() - begun < 1.0
    assert client._process.returncode == 0
    assert not psutil.pid_exists(client.pid) and not client._wire.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_whole_group_leave_the_end_to_the_client(number: int) -> None:
    async with engine() as client:
        os.kill(client.pid, number)
        await asyncio.sleep(0.1)
        assert len(tokens(await collect(client, request(client)))) == 16


async def test_why_it_could_not_start_is_never_lost() -> None:
    for _ in range(5):
        with pytest.raises(BackendError, match="nonsense"):
            await AsyncEngineClient.start(
                EngineOptions(
                    model=ModelOptions(model="toy"),
                    backend=BackendOptions(device="null", options={"nonsense": "1"}),
                ),
                log_level="ERROR",
            )


async def test_sockets_are_private() -> None:
    async with engine() as client:
        folder = client._wire.folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert client._wire.to_engine.startswith("ipc://") and client._wire.from_engine.startswith("ipc://")
        for process in (psutil.Process(client.pid), psutil.Process()):
            listening = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert not listening


async def test_the_engine_process_of_a_torchless_backend_loads_no_torch() -> None:
    async with engine() as client:
        await collect(client, request(client))
        mapped = [region.path for region in psutil.Process(client.pid).memory_maps()]
        assert any("zmq" in path for path in mapped)
        assert not any("torch" in path for path in mapped)


async def test_client_objects_do_not_pile_up() -> None:
    async with engine() as client:
        await asyncio.gather(*(collect(client, request(client)) for _ in range(50)))
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(10):
            await asyncio.gather(*(collect(client, request(client)) for _ in range(50)))
        gc.collect()
        assert len(gc.get_objects()) - before < 500
        assert not client._streams
