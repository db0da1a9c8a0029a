"""``GET /metrics``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from isthmus_server.exposition import CONTENT_TYPE
from isthmus_server.routes.documented import READ_ERRORS
from isthmus_server.service import Service


def add_routes(router: APIRouter, service: Service) -> None:
    @router.get("/metrics", summary="Prometheus metrics", responses=READ_ERRORS)
    async def metrics() -> Response:
        return Response(service.exposition.render(), headers={"content-type": CONTENT_TYPE})
