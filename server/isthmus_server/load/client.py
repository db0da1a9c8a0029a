"""A load generator that is not itself the load.

One raw connection a worker; a read is searched for the starts of events, never parsed, so that a
token costs the client a few microseconds.  Only the last event of a stream is read, for its counts.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from isthmus.errors import IsthmusError
from isthmus_server.load.report import Seen
from isthmus_server.load.workload import LoadRequest

# Inside a JSON text a quote is escaped, so this never stands in what a model wrote.
_EVENT: Final = b'data: {"'
_LAST: Final = b"data: [DONE]"
_ERROR: Final = b'data: {"error"'
_BODY_END: Final = b"\r\n0\r\n\r\n"
_KEPT: Final = 2048
"""Bytes kept from one read to the next: enough for the last events."""
_PROMPT_COUNT: Final = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_OUTPUT_COUNT: Final = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
TIMEOUT_S: Final = 600.0
CLOSED: Final = "connection closed"


class Target:
    """A server under load, by its base address."""

    def __init__(self, url: str, api_key: str | None) -> None:
        found = urlsplit(url if "://" in url else f"http://{url}")
        if found.scheme != "http" or not found.hostname:
            raise IsthmusError(f"{url!r} is no address for this; write http://host:port")
        self.host = found.hostname
        self.port = found.port or 80
        self._prefix = found.path.rstrip("/").removesuffix("/v1")
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    def encode(self, body: dict[str, Any], path: str = "/v1/completions") -> bytes:
        payload = json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        return head.encode() + payload


class _Stream(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._seen = Seen(0.0)
        self._last_s = 0.0
        self._tail = b""
        self._head_read = False

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def answered(self) -> bool:
        """Whether anything of an answer to the last request has come."""
        return bool(self._tail)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._finish(CLOSED)

    async def ask(self, request: bytes) -> Seen:
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._tail = b""
        self._head_read = False
        self._last_s = 0.0
        self._seen = Seen(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._done
        except TimeoutError:
            self._seen.error = "timeout"
            self.close()
        return self._seen

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        seen = self._seen
        # An event's start may be cut by the end of a read: look at it with what came before.
        joined = self._tail[-len(_EVENT) + 1 :] + data
        events = joined.count(_EVENT)
        if events:
            if self._last_s:
                seen.gaps_s.append(now - self._last_s)
            else:
                seen.ttft_s = now - seen.started_s
            seen.gaps_s.extend([0.0] * (events - 1))
            self._last_s = now
        received = self._tail + data
        if not self._head_read:
            self._read_head(received)
        self._tail = received[-_KEPT:]
        if self._tail.endswith(_BODY_END):
            self._end(now)

    def _read_head(self, received: bytes) -> None:
        line, separator, _ = received.partition(b"\r\n")
        if not separator:
            return
        self._head_read = True
        status = line.split(b" ")[1:2]
        if status != [b"200"]:
            self._finish(f"HTTP {b''.join(status).decode('latin-1')}")
            self.close()

    def _end(self, now: float) -> None:
        seen = self._seen
        seen.ended_s = now
        prompt, output = _PROMPT_COUNT.findall(self._tail), _OUTPUT_COUNT.findall(self._tail)
        if _ERROR in self._tail:
            self._finish("error event")
        elif _LAST not in self._tail:
            self._finish("no [DONE]")
        elif not output:
            self._finish("no usage")
        else:
            seen.prompt_tokens, seen.output_tokens = int(prompt[-1]), int(output[-1])
            # The last event tells of usage and brings no token.
            if seen.gaps_s:
                seen.gaps_s.pop()
            self._finish("")

    def _finish(self, error: str) -> None:
        if self._done is not None and not self._done.done():
            self._seen.error = error
            self._done.set_result(None)


async def drive(
    target: Target, model: str, requests: Sequence[LoadRequest], concurrency: int
) -> tuple[list[Seen], float]:
    """Send all, ``concurrency`` at a time; what was seen of each, in order, and the seconds it took."""
    encoded = [
        target.encode(
            {
                "model": model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        for request in requests
    ]
    seen: list[Seen] = [Seen(0.0) for _ in requests]
    waiting = iter(range(len(requests)))

    async def work() -> None:
        stream: _Stream | None = None
        for index in waiting:
            reused = stream is not None and stream.open
            if stream is None or not stream.open:
                stream = await _connect(target)
            seen[index] = await stream.ask(encoded[index])
            if seen[index].error == CLOSED and reused and not stream.answered:
                # A server may close a connection that it kept open; the request was never read.
                stream = await _connect(target)
                seen[index] = await stream.ask(encoded[index])
        if stream is not None:
            stream.close()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(min(concurrency, len(requests)))))
    return seen, time.perf_counter() - started


async def _connect(target: Target) -> _Stream:
    loop = asyncio.get_running_loop()
    try:
        _, stream = await loop.create_connection(_Stream, target.host, target.port)
    except OSError as error:
        raise IsthmusError(f"cannot reach {target.host}:{target.port}: {error.strerror or error}") from error
    return stream
