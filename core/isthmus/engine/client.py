"""The asyncio side of an engine process: starts it, talks to it, and notices at once when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import msgspec
import zmq

from isthmus import errors
from isthmus.config import EngineOptions
from isthmus.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStart,
    EngineStats,
    FromEngine,
    Outputs,
    RequestRefused,
    Shutdown,
    ToEngine,
    TokensOut,
    Wire,
)
from isthmus.errors import EngineDead, InvalidRequest, IsthmusError, QueueFull

logger = logging.getLogger(__name__)

READ_AT_ONCE: Final = 64
"""Messages handled before other tasks of the loop get their turn."""
LAST_WORDS_S: Final = 0.03
"""How long after the process's end its last messages are waited for."""
FIRST_WORDS_S: Final = 1.0
"""The same before it was ready: nobody streams yet, and the message says why it could not start."""
RETRY_S: Final = 0.05
MAX_SOCKET_PATH: Final = 100
"""A Unix socket's path holds 107 bytes on Linux and 103 on macOS."""


class _Stream:
    """What arrived for one request and was not taken yet.  Bounded by the request's own length."""

    __slots__ = ("_items", "_loop", "_waiter", "failure")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[TokensOut] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.failure: Exception | None = None

    def put(self, item: TokensOut) -> None:
        # One of these a token: the hot path of the whole client.
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, failure: Exception) -> None:
        """End the stream after what it holds: a last item that came together with the failure still counts."""
        self.failure = failure
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> TokensOut:
        while not self._items:
            if self.failure is not None:
                raise self.failure
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._items.popleft()


class _Wire:
    """The two sockets, in a private folder; the receiving one is read from the event loop.

    A ZeroMQ socket's file descriptor is edge-triggered: it becomes readable once, and the socket
    has to be emptied (or visited again) before the loop may wait for it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="isthmus-"))  # mode 0700
        self.to_engine = f"ipc://{self.folder / 'to_engine'}"
        self.from_engine = f"ipc://{self.folder / 'from_engine'}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outlet = self._context.socket(zmq.PUSH)
        self._outlet.sndhwm = Wire.QUEUED_REQUESTS
        self._outlet.linger = 0
        self._inlet = self._context.socket(zmq.PULL)
        self._inlet.rcvhwm = Wire.QUEUED_OUTPUTS
        self._inlet.maxmsgsize = int(Wire.MAX_MESSAGE_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        if len(os.fsencode(self.folder)) > MAX_SOCKET_PATH - len("/from_engine"):
            self.close()
            raise IsthmusError(f"the path {self.folder} is too long for a socket; set TMPDIR to a shorter one")
        self._inlet.bind(self.from_engine)
        self._outlet.connect(self.to_engine)

    @property
    def descriptor(self) -> int:
        return int(self._inlet.get(zmq.FD))

    def send(self, message: ToEngine) -> bool:
        """Whether there was room.  Raises :class:`InvalidRequest` for a message over the wire's limit."""
        encoded = self._encoder.encode(message)
        if len(encoded) > Wire.MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"the request takes {len(encoded)} bytes; at most {int(Wire.MAX_MESSAGE_BYTES)} fit")
        try:
            self._outlet.send(encoded, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> FromEngine | None:
        """The next message that can be decoded, or ``None``."""
        while int(self._inlet.get(zmq.EVENTS)) & zmq.POLLIN:
            frames = self._inlet.recv_multipart(zmq.NOBLOCK)
            try:
                message: FromEngine = self._decoder.decode(b"".join(frames))
            except ValueError as error:
                logger.warning("dropped a malformed message of %d bytes: %s", sum(map(len, frames)), error)
            else:
                return message
        return None

    def close(self) -> None:
        self._outlet.close(linger=0)
        self._inlet.close(linger=0)
        self._context.term()
        shutil.rmtree(self.folder, ignore_errors=True)


class AsyncEngineClient:
    """An engine process and the streams of its requests.  Belongs to the event loop that started it.

    The engine process ends when this process does.  Use as an async context manager, or call
    :meth:`shutdown`.
    """

    def __init__(self, wire: _Wire, process: subprocess.Popen[bytes]) -> None:
        self._wire = wire
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, _Stream] = {}
        self._ids = itertools.count()
        self._aborts: list[int] = []
        self._ready: asyncio.Future[EngineReady] = self._loop.create_future()
        self._dead: asyncio.Future[str] = self._loop.create_future()
        self._exited = asyncio.Event()
        self._failed: EngineFailed | None = None
        self._stopping = False
        self.stats: EngineStats | None = None
        """The last heartbeat."""
        self._descriptor = wire.descriptor
        self._loop.add_reader(self._descriptor, self._read)
        self._loop.call_soon(self._read)  # the descriptor tells of changes, not of what was there before
        threading.Thread(target=self._watch, name="isthmus-engine-exit", daemon=True).start()

    @classmethod
    async def start(
        cls, options: EngineOptions, *, progress: bool = True, log_level: str = "INFO"
    ) -> AsyncEngineClient:
        """Spawn an engine and wait until it is ready.

        Raises the :class:`IsthmusError` that the engine ended with, or :class:`EngineDead`.
        """
        wire = _Wire()
        try:
            process = _spawn(
                EngineStart(
                    options=options,
                    to_engine=wire.to_engine,
                    from_engine=wire.from_engine,
                    parent_pid=os.getpid(),
                    progress=progress,
                    log_level=log_level,
                )
            )
        except BaseException:
            wire.close()
            raise
        client = cls(wire, process)
        try:
            await asyncio.shield(client._ready)
        except BaseException:
            await client.shutdown(timeout_s=0.0)
            raise
        return client

    async def __aenter__(self) -> AsyncEngineClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    @property
    def ready(self) -> EngineReady:
        """What the engine settled on."""
        return self._ready.result()

    @property
    def _max_streams(self) -> int:
        # The engine would refuse more too, but only between two steps.
        return self.ready.max_num_seqs + self.ready.max_waiting

    @property
    def alive(self) -> bool:
        """Whether the engine can take requests, as far as is known."""
        return self._ready.done() and not self._dead.done() and not self._stopping

    @property
    def pid(self) -> int:
        return self._process.pid

    def next_request_id(self) -> int:
        return next(self._ids)

    async def generate(self, request: AddRequest) -> AsyncGenerator[TokensOut, None]:
        """What each step brings for ``request``, until an item with a ``finish_reason``.

        The request is sent when the first item is asked for; closing the generator aborts it.
        Raises :class:`InvalidRequest` or :class:`QueueFull` if it is refused, and
        :class:`EngineDead` when the engine ends.
        """
        request_id = request.request_id
        if self._dead.done() or self._stopping:
            raise EngineDead(self._dead.result() if self._dead.done() else "the engine is shutting down")
        if request_id in self._streams:
            raise InvalidRequest(f"request id {request_id} is in use; take one from next_request_id()")
        if len(self._streams) >= self._max_streams or not self._wire.send(request):
            raise QueueFull(f"{len(self._streams)} requests run or wait, as many as may; try again later")
        stream = self._streams[request_id] = _Stream(self._loop)
        open_there = True
        try:
            while open_there:
                item = await stream.get()
                open_there = item.finish_reason is None
                yield item
        finally:
            del self._streams[request_id]
            if open_there and stream.failure is None:
                self._abort(request_id)

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has ended."""
        return await asyncio.shield(self._dead)

    async def shutdown(self, timeout_s: float = 5.0) -> None:
        """End the engine: open streams raise :class:`EngineDead`.  May be called more than once.

        A process that has not ended after ``timeout_s`` is killed.
        """
        first, self._stopping = not self._stopping, True
        if first and not self._dead.done() and timeout_s > 0:
            self._wire.send(Shutdown())
            await self._wait_exit(timeout_s)
        if not self._exited.is_set():
            self._process.kill()
        await self._exited.wait()
        self._die("the engine was shut down")
        if first:
            self._loop.remove_reader(self._descriptor)
            self._wire.close()

    async def _wait_exit(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), timeout_s)

    def _watch(self) -> None:
        """On a thread: wait for the process to end, which no queue or socket can delay."""
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed before the engine ended
            self._loop.call_soon_threadsafe(self._on_exit, code)

    def _on_exit(self, code: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._exited.set()
        if not self._dead.done() and not self._stopping:
            self._read()
            patience_s = LAST_WORDS_S if self._ready.done() else FIRST_WORDS_S
            self._loop.call_later(patience_s, self._on_last_words, code)

    def _on_last_words(self, code: int) -> None:
        if not self._dead.done() and not self._stopping:
            self._read()
            self._die(self._failed.message if self._failed else f"the engine process ended {_how(code)}")

    def _read(self) -> None:
        if self._stopping and self._exited.is_set():
            return
        for _ in range(READ_AT_ONCE):
            message = self._wire.receive()
            if message is None:
                return
            self._take(message)
        self._loop.call_soon(self._read)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                streams = self._streams
                for item in message.items:
                    stream = streams.get(item.request_id)
                    if stream is not None:  # else aborted here, and the engine has not heard yet
                        stream.put(item)
            case EngineStats():
                self.stats = message
            case RequestRefused():
                if message.request_id in self._streams:
                    self._streams[message.request_id].fail(_refusal(message))
            case EngineReady():
                if not self._ready.done():
                    self._ready.set_result(message)
            case EngineFailed():
                self._failed = message
                self._die(message.message)

    def _die(self, reason: str) -> None:
        if self._dead.done():
            return
        self._dead.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(_raised(self._failed) if self._failed else EngineDead(reason))
            self._ready.exception()  # whoever waits sees it; nobody waiting is no leak
        for stream in self._streams.values():
            stream.fail(EngineDead(reason))

    def _abort(self, request_id: int) -> None:
        """Aborts of one turn of the loop go in one message."""
        if not self._aborts:
            self._loop.call_soon(self._send_aborts)
        self._aborts.append(request_id)

    def _send_aborts(self) -> None:
        if self._dead.done() or self._stopping or self._wire.send(AbortRequests(request_ids=tuple(self._aborts))):
            self._aborts.clear()
        else:
            self._loop.call_later(RETRY_S, self._send_aborts)


def _spawn(start: EngineStart) -> subprocess.Popen[bytes]:
    """Start the process from the calling thread: on Linux the engine ends with that thread."""
    # -P: the working directory is not a place to import from.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "isthmus.engine.process"],
        stdin=subprocess.PIPE,
        stdout=2,  # what a library prints must not mix with our own output
    )
    encoded = msgspec.msgpack.encode(start)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended already, which its exit will tell
        process.stdin.write(struct.pack("<I", len(encoded)) + encoded)
        process.stdin.flush()
    return process


def _refusal(message: RequestRefused) -> IsthmusError:
    return QueueFull(message.message) if message.queue_full else InvalidRequest(message.message, param=message.param)


def _raised(failed: EngineFailed) -> IsthmusError:
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, IsthmusError):
        return kind(failed.message)
    return EngineDead(failed.message)


def _how(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with exit status {code}"
