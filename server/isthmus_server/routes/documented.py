"""What the OpenAPI description says about every answer of the API."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]

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


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def errors(*statuses: int) -> Responses:
    return {status: {"description": _TEXTS[status], "content": _json("ErrorBody")} for status in statuses}


API_ERRORS: Final = errors(400, 401, 404, 405, 408, 413, 415, 500, 503)
READ_ERRORS: Final = errors(401, 404, 405, 503)


def answers(
    description: str, model: type[BaseModel], failures: Responses, *, event: type[BaseModel] | None = None
) -> Responses:
    """``model`` is the whole answer, ``event`` what the ``data:`` lines of its stream hold."""
    content = _json(model.__name__)
    if event is not None:
        text = f"Lines of `data: ` with a {event.__name__} or an ErrorBody each, and at last `data: [DONE]`."
        content["text/event-stream"] = {"schema": {"type": "string", "description": text}}
    return {200: {"description": description, "content": content}, **failures}
