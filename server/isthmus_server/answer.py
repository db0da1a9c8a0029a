"""Writing an answer: whole or as server-sent events, and ending its generation when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from isthmus.errors import EngineDead, IsthmusError
from isthmus.text.output import Delta
from isthmus_server.api_error import ApiError, api_error
from isthmus_server.gate import OUTCOME, REQUEST_ID
from isthmus_server.generation import Choice, Generation
from isthmus_server.lifecycle import Lifecycle, RunningRequest
from isthmus_server.telemetry import Telemetry

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"

_EVENT_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Writer(Protocol):
    """Shapes one endpoint's answers."""

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        """The events that tell of ``delta``; empty if it shows nothing yet."""
        ...

    def usage_chunk(self, generation: Generation) -> bytes:
        """The event before the last, empty where it was not asked for."""
        ...

    def keep(self, choice: Choice, delta: Delta) -> None:
        """Collects ``delta`` for :meth:`whole`."""
        ...

    def whole(self, generation: Generation) -> bytes: ...


class GeneratedResponse(Response):
    """Runs a generation and writes it.

    Until the first bytes are written a failure is an HTTP status; after that it is an ``error``
    event, and then the stream ends.  A stream always ends in ``[DONE]`` or in an error.
    """

    def __init__(
        self, generation: Generation, writer: Writer, lifecycle: Lifecycle, telemetry: Telemetry, *, stream: bool
    ) -> None:
        # Deliberately not calling the base: there is no body to render yet.
        self.status_code = 200
        self.background = None
        self._generation = generation
        self._writer = writer
        self._lifecycle = lifecycle
        self._telemetry = telemetry
        self._stream = stream
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._lifecycle.request() as running:
                await self._run(running, scope, receive, send)
        except ApiError as error:
            self._telemetry.saw_rejection(error)
            await self._fail(error, send)

    async def _run(self, running: RunningRequest, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_watch(receive, running))
        try:
            await (self._write_events(running, send) if self._stream else self._write_whole(running, send))
        except asyncio.CancelledError:
            if running.gone:
                running.task.uncancel()
                self._telemetry.aborted["disconnect"] += 1
                return
            if running.cut is None:
                raise
            running.task.uncancel()
            self._telemetry.aborted["shutdown"] += 1
            await self._fail(running.cut, send)
        except Exception as error:  # one request's fault ends that request, and says so in its stream
            if not isinstance(error, ApiError | IsthmusError):
                logger.exception("request %s failed", scope.get(REQUEST_ID))
            found = api_error(error)
            self._count(error, found)
            await self._fail(found, send)
        finally:
            running.done = True  # nothing left to cancel
            scope[OUTCOME] = self._generation.outcome()
            watcher.cancel()

    def _count(self, error: Exception, found: ApiError) -> None:
        if isinstance(error, EngineDead):
            self._telemetry.aborted["engine_dead"] += 1
        elif self._started or found.status == 500:
            self._telemetry.aborted["error"] += 1
        else:
            self._telemetry.saw_rejection(found)

    async def _write_events(self, running: RunningRequest, send: Send) -> None:
        chunk = self._writer.chunk
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for choice, delta in deltas:
                body = chunk(choice, delta)
                if not body:
                    continue
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
                await send({"type": "http.response.body", "body": body, "more_body": True})
        running.done = True
        self._generation.finished()
        await send({"type": "http.response.body", "body": self._writer.usage_chunk(self._generation) + DONE})

    async def _write_whole(self, running: RunningRequest, send: Send) -> None:
        keep = self._writer.keep
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for choice, delta in deltas:
                keep(choice, delta)
        running.done = True
        self._generation.finished()
        await _send_json(send, 200, self._writer.whole(self._generation), {})

    async def _fail(self, error: ApiError, send: Send) -> None:
        if self._started:
            await send({"type": "http.response.body", "body": b"data: " + error.encoded() + b"\n\n"})
        else:
            await _send_json(send, error.status, error.encoded(), error.headers)


async def _watch(receive: Receive, running: RunningRequest) -> None:
    """Cancels the request's task once its client has gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            if not running.done and not running.gone and running.cut is None:
                running.gone = True
                running.task.cancel()
            return


async def _send_json(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
