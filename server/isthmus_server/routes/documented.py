"""What the OpenAPI description says about every answer of the API."""

from __future__ import annotations

from typing import Any, Final

_ERROR: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
}

ERROR_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_TEXTS: Final = {
    400: "A field is missing, wrong or not supported; `param` names it.",
    401: "No valid API key.",
    404: "No such path or model.",
    405: "The path does not take this method.",
    408: "The body stopped coming.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "The engine could not complete the request.",
    503: "Not ready, the queue is full, shutting down, or the engine has ended; see Retry-After.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _TEXTS[status], **_ERROR} for status in statuses}


API_ERRORS: Final = errors(400, 401, 404, 405, 408, 413, 415, 500, 503)
READ_ERRORS: Final = errors(401, 404, 405, 503)


def answers(description: str, schema: dict[str, Any], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": description, "content": content}, **API_ERRORS}
