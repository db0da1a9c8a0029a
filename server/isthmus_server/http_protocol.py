"""uvicorn, with bounds on the head of a request and without its own ideas of a process's end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from isthmus_server.api_error import ApiError
from isthmus_server.settings import MAX_HEADER_BYTES, MAX_HEADERS

HEAD_TIMEOUT_S: Final = 30.0
KEEP_ALIVE_S: Final = 75
CLOSE_S: Final = 2
"""How long connections may take to close at the end."""


class _HeadTooLarge(Exception):
    pass


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head over the bounds and closes a connection whose head does not come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # The parser keeps an unfinished header to itself, so that only its length is to be had.
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if self._too_large():
            raise _HeadTooLarge
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        # Called for whatever the parser, or a callback of it, could not take.
        if self._too_large():
            self._refuse_head()
        else:
            self._refuse(ApiError(400, "this is no valid HTTP request", code="invalid_http"), b"400 Bad Request")

    def _too_large(self) -> bool:
        headers = self.headers or []
        size = sum(len(name) + len(value) for name, value in headers)
        return len(headers) > MAX_HEADERS or size + len(self.url or b"") > MAX_HEADER_BYTES

    def _refuse_head(self) -> None:
        error = ApiError(
            431,
            f"the request's head is larger than {MAX_HEADER_BYTES} bytes or has more than {MAX_HEADERS} fields",
            code="head_too_large",
        )
        self._refuse(error, b"431 Request Header Fields Too Large")

    def _refuse(self, error: ApiError, status: bytes) -> None:
        if self.transport.is_closing():
            return
        body = error.encoded()
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers; says when it accepts."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
        )
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()
