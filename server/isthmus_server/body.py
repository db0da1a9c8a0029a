"""A request's body as a checked model, and the OpenAPI description of that."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from isthmus_server.api_error import ApiError, bad_request

INLINE_BYTES: Final = 256 * 2**10
"""A larger body is parsed on a thread, so that other streams go on."""
BODY_TIMEOUT_S: Final = 30.0
"""The longest wait for the next piece of a body."""

M = TypeVar("M", bound=BaseModel)

_MEDIA: Final = "application/json"


async def read_model(request: Request, model: type[M]) -> M:
    """Raises :class:`ApiError`: 400 naming the first bad field, 408, 413 or 415."""
    media = request.headers.get("content-type", _MEDIA).partition(";")[0].strip().lower()
    if media != _MEDIA and not media.endswith("+json"):
        # A page in a browser may send any other type to this machine without asking first.
        raise ApiError(415, f"the Content-Type is {media[:100]!r}; send {_MEDIA}", code="unsupported_media_type")
    raw = await _read(request)
    if len(raw) <= INLINE_BYTES:
        return _parse(raw, model)
    return await asyncio.get_running_loop().run_in_executor(None, _parse, raw, model)


async def _read(request: Request) -> bytes:
    pieces: list[bytes] = []
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                piece = await anext(stream, None)
            if piece is None:
                return b"".join(pieces)
            pieces.append(piece)
    except TimeoutError:
        raise ApiError(
            408, f"no byte of the body came for {BODY_TIMEOUT_S:.0f} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client went before its body had come") from None


def _parse(raw: bytes, model: type[M]) -> M:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])[:200]
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return bad_request(text, code="invalid_json")
    if first["type"] == "missing":
        return bad_request(f"{path} is missing", param=path, code="missing_required_parameter")
    joined = f"{path} {text}" if text[:1].islower() else f"{path}: {text}"
    return bad_request(joined, param=path or None, code="invalid_value")


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads ``model``; :func:`components` holds the schema."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {_MEDIA: {"schema": reference}}}}


def components(*models: type[BaseModel]) -> dict[str, Any]:
    """Schemas of ``models`` and of all that they refer to, by name."""
    found: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found.update(schema.pop("$defs", {}))
        found[model.__name__] = schema
    return found
