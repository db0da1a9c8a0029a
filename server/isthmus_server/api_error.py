"""What goes wrong, in the shape that OpenAI's clients read: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from isthmus.errors import EngineDead, InvalidRequest, IsthmusError, QueueFull

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

_MAX_MESSAGE = 2000


class ApiError(Exception):
    """An answer other than success.  ``headers`` are added to the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + " ..."
        self.code = code
        self.param = param
        self.type = type or (INVALID_REQUEST if status < 500 else SERVER_ERROR)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body())


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, *, retry_after_s: float = 1.0, close: bool = False) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
    if close:
        headers["Connection"] = "close"
    return ApiError(503, message, code=code, headers=headers)


def api_error(error: Exception) -> ApiError:
    """``error`` as an answer.  What is not a deliberate error says nothing of its inside to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return bad_request(str(error), param=error.param)
    if isinstance(error, QueueFull):
        return unavailable(str(error), "queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, EngineDead):
        return ApiError(503, "the engine has ended; the server is shutting down", code="engine_dead")
    if isinstance(error, IsthmusError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(
        500, "internal error; the server's log has its cause under this request's id", code="internal_error"
    )
