"""What every request passes first: its id, its key, the bound on its body, its place in the metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus_server.access import PUBLIC_PATHS, Keys
from isthmus_server.api_error import ApiError, api_error, unavailable
from isthmus_server.settings import MAX_BODY_BYTES, MAX_BUFFERED_BYTES
from isthmus_server.telemetry import Telemetry

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("isthmus_server.access_log")

KEY_DIGEST: Final = "isthmus.key_digest"
"""Where the scope keeps the digest of the caller's key."""

REQUEST_ID: Final = "isthmus.request_id"
OUTCOME: Final = "isthmus.outcome"
"""Where a route may leave what its line in the access log is to say besides."""
GONE: Final = 499
"""The status, in logs and metrics, of a request whose client went before it had one."""

_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_KNOWN_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Gate:
    """Outermost of our layers.  Nothing behind it runs for a caller without a key."""

    def __init__(self, app: ASGIApp, keys: Keys, telemetry: Telemetry, *, access_log: bool = False) -> None:
        self._app = app
        self._keys = keys
        self._telemetry = telemetry
        self._access_log = access_log
        self._bodies = _Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        request_id = _request_id(scope)
        scope[REQUEST_ID] = request_id.decode()
        exchange = _Exchange(receive, send, request_id, self._bodies)
        try:
            scope[KEY_DIGEST] = self._keys.check(scope)
            _check_length(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("request %s failed", scope[REQUEST_ID])
            if exchange.status:
                raise
            await send_error(api_error(error), scope, exchange.send)
        finally:
            exchange.end()
            status, took_s = exchange.status or GONE, time.monotonic() - started_s
            self._telemetry.saw_http(_handler(scope), _method(scope), status, took_s)
            if self._access_log and scope["path"] not in PUBLIC_PATHS:
                access_logger.info("%s", _access_line(scope, status, took_s))


class _Bodies:
    """What the bodies of all requests in progress take."""

    def __init__(self) -> None:
        self.num_bytes = 0


class _Exchange:
    """One request's two directions: bounds what comes, marks what goes."""

    def __init__(self, receive: Receive, send: Send, request_id: bytes, bodies: _Bodies) -> None:
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._bodies = bodies
        self._received = 0
        self.status = 0
        """0 until the answer starts."""

    async def receive(self) -> Message:
        """Raises :class:`ApiError` as soon as too much has come, whatever the headers promised."""
        message = await self._receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._received += size
            self._bodies.num_bytes += size
            if self._received > MAX_BODY_BYTES:
                raise _too_large()
            if self._bodies.num_bytes > MAX_BUFFERED_BYTES:
                raise unavailable("too many large requests at a time", "queue_full")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
            message = {**message, "headers": headers}
        await self._send(message)

    def end(self) -> None:
        self._bodies.num_bytes -= self._received


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    body = error.encoded()
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope.get("method") == "HEAD" else body})


def _access_line(scope: Scope, status: int, took_s: float) -> str:
    """JSON, without a word of what was asked or answered; of a key only the start of its digest."""
    digest: bytes = scope.get(KEY_DIGEST, b"")
    line = {
        "request_id": scope[REQUEST_ID],
        "method": _method(scope),
        "path": _handler(scope),
        "status": status,
        "ms": round(took_s * 1000, 1),
        "key": digest[:4].hex() or None,
        **scope.get(OUTCOME, {}),
    }
    return msgspec.json.encode(line).decode()


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _ID.fullmatch(value):
                return bytes(value)
            break
    return uuid.uuid4().hex.encode()


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {MAX_BODY_BYTES} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _check_length(scope: Scope) -> None:
    for name, value in scope["headers"]:
        # Digits beyond any size we take need not become a number.
        if name == b"content-length" and (len(value) > 12 or not value.isdigit() or int(value) > MAX_BODY_BYTES):
            raise _too_large()


def _handler(scope: Scope) -> str:
    """The route's pattern, not the path: a caller must not be able to make new time series."""
    route = scope.get("route")
    return getattr(route, "path", None) or "none"


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _KNOWN_METHODS else "other"
