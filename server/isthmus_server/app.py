"""The HTTP application."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from isthmus.errors import IsthmusError
from isthmus.version import __version__
from isthmus_server.api_error import ApiError, api_error
from isthmus_server.body import components
from isthmus_server.gate import Gate
from isthmus_server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, responses
from isthmus_server.routes import chat, completions, health, metrics, models
from isthmus_server.service import Service

_ANSWERS: Final = (
    responses.ChatCompletion,
    responses.ChatCompletionChunk,
    responses.Completion,
    responses.ModelList,
    responses.Tokenized,
    responses.Detokenized,
    responses.Version,
    responses.ErrorBody,
)


def create_app(service: Service) -> FastAPI:
    """The application of ``service``, which may be opened before or after."""
    app = FastAPI(title="Isthmus", version=__version__, docs_url=None, redoc_url=None)
    router = APIRouter(default_response_class=Response)
    for group in (completions, chat, models, health, metrics):
        group.add_routes(router, service)
    app.include_router(router)
    app.add_middleware(Gate, keys=service.keys, telemetry=service.telemetry, access_log=service.settings.access_log)

    async def on_error(request: Request, error: Exception) -> Response:
        found = api_error(error)
        service.telemetry.saw_rejection(found)
        return _response(found)

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(IsthmusError, on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _describe(app, service)
    return app


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    method, path = request.scope["method"], request.scope["path"][:200]
    if error.status_code == 404:
        return _response(ApiError(404, f"there is no {path!r} here", code="not_found"))
    if error.status_code == 405:
        found = ApiError(405, f"{path!r} does not take {method[:16]}", code="method_not_allowed", headers=error.headers)
        return _response(found)
    return _response(ApiError(error.status_code, error.detail or HTTPStatus(error.status_code).phrase))


def _response(error: ApiError) -> Response:
    return Response(error.encoded(), status_code=error.status, headers=error.headers, media_type="application/json")


def _describe(app: FastAPI, service: Service) -> None:
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = described()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(components(CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest))
            schemas.update(components(*_ANSWERS))
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            if service.keys.required:
                schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
