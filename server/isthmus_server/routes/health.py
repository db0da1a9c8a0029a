"""Probes.  They never touch the engine's queue, and take no key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from isthmus_server.api_error import ApiError, unavailable
from isthmus_server.routes.documented import errors
from isthmus_server.service import Service


def add_routes(router: APIRouter, service: Service) -> None:
    @router.get("/livez", summary="Whether to leave this process alive", responses=errors(503))
    @router.head("/livez", include_in_schema=False)
    async def livez() -> Response:
        return _alive(service)

    @router.get("/readyz", summary="Whether to send requests here", responses=errors(503))
    @router.head("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        _alive(service)
        if not service.lifecycle.ready:
            raise unavailable(f"the server is {service.lifecycle.phase}", "not_ready")
        return Response(status_code=200)

    @router.get("/health", summary="Whether requests can be answered", responses=errors(503))
    @router.head("/health", include_in_schema=False)
    async def health() -> Response:
        return _healthy(service)

    @router.get("/ping", summary="The same as /health", responses=errors(503))
    @router.post("/ping", include_in_schema=False)
    @router.head("/ping", include_in_schema=False)
    async def ping() -> Response:
        return _healthy(service)


def _alive(service: Service) -> Response:
    why_not = service.liveness()
    if why_not is not None:
        raise ApiError(503, why_not, code="engine_dead")
    return Response(status_code=200)


def _healthy(service: Service) -> Response:
    _alive(service)
    service.lifecycle.require_accepting()
    return Response(status_code=200)
