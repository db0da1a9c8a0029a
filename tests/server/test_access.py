"""Every route needs a key unless it is on the public list, whatever the request looks like."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any
from unittest import mock

import httpx
import pytest

from isthmus_server import access
from isthmus_server.access import PUBLIC_PATHS, Keys, cache_salt
from isthmus_server.api_error import ApiError
from isthmus_server.app import create_app
from isthmus_server.service import Service

KEYS = ("first-key", "second-key")
MakeService = Callable[..., Service]
AppClient = Callable[[Service], httpx.AsyncClient]

# A new route is classified here, by hand, before this file passes.
CLASSIFIED = {
    "/health": True,
    "/livez": True,
    "/readyz": True,
    "/ping": True,
    "/v1/completions": False,
    "/v1/chat/completions": False,
    "/v1/models": False,
    "/v1/models/{name:path}": False,
    "/version": False,
    "/tokenize": False,
    "/detokenize": False,
    "/metrics": False,
    "/openapi.json": False,
}


def every_route(service: Service) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def walk(routes: Any) -> None:
        for route in routes:
            if hasattr(route, "methods") and hasattr(route, "path"):
                found.extend((method, route.path) for method in sorted(route.methods))
            else:
                inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", ())
                assert inner, f"a route that this test cannot read: {route!r}"
                walk(inner)

    walk(create_app(service).routes)
    return found


def test_every_route_is_classified(make_service: MakeService) -> None:
    paths = {path for _, path in every_route(make_service())}
    assert paths == set(CLASSIFIED)
    assert {path for path, public in CLASSIFIED.items() if public} == PUBLIC_PATHS


BAD_KEYS: list[dict[str, str]] = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic first-key"},
    {"Authorization": "first-key"},
    {"Authorization": "Bearer first-key x"},
    {"Authorization": "Bearer first-ke"},
    {"X-Api-Key": "first-key"},
    {"Host": "localhost/health?"},
    {"Host": "x/livez?y="},
    {"X-Original-Url": "/health", "X-Forwarded-Prefix": "/health"},
]


async def test_no_route_opens_without_a_key(make_service: MakeService, app_client: AppClient) -> None:
    service = make_service(api_keys=KEYS)
    routes = every_route(service)
    async with app_client(service) as client:
        for method, path in routes:
            concrete = path.replace("{name:path}", "toy")
            for headers in BAD_KEYS:
                answer = await client.request(method, concrete, headers=headers)
                if CLASSIFIED[path]:
                    assert answer.status_code == 200, (method, path, headers)
                    continue
                assert answer.status_code == 401, (method, path, headers)
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_no_way_around_the_path(make_service: MakeService, app_client: AppClient) -> None:
    service = make_service(api_keys=KEYS)
    tricks = (
        *("//v1/models", "/v1//models", "/%76%31/models", "/health/../v1/models", "/health/%2e%2e/v1/models"),
        *("/health%2f..%2fv1/models", "/health/", "/healthz", "/health;/v1/models", "/livez/v1/models", "/docs"),
        *("/redoc", "/nothing", "/", "/health%00", "/HEALTH", "/v1/models?x=/health", "/v1/models#/health"),
    )
    async with app_client(service) as client:
        for path in tricks:
            for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "TRACE"):
                # The URL is handed over as it is: nothing here tidies it up first.
                request = client.build_request(method, "http://test")
                request.url = httpx.URL(scheme="http", host="test", raw_path=path.partition("#")[0].encode())
                answer = await client.send(request)
                assert answer.status_code == 401, (method, path)


@pytest.mark.parametrize("root_path", ["", "/v", "/v1", "/health"])
async def test_a_root_path_opens_nothing(make_service: MakeService, root_path: str) -> None:
    service = make_service(api_keys=KEYS)
    transport = httpx.ASGITransport(app=create_app(service), root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/v1/models", "/metrics", f"{root_path}/metrics", f"{root_path}/v1/models"):
            assert (await client.get(path)).status_code == 401


async def test_a_websocket_is_closed(make_service: MakeService) -> None:
    app = create_app(make_service(api_keys=KEYS))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/v1/completions", "headers": [], "query_string": b""}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_each_key_opens(make_service: MakeService, app_client: AppClient) -> None:
    async with app_client(make_service(api_keys=KEYS)) as client:
        for key in KEYS:
            for scheme in ("Bearer", "bearer"):
                answer = await client.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
                assert answer.status_code == 200
    async with app_client(make_service()) as client:
        assert (await client.get("/v1/models")).status_code == 200


def test_every_key_is_compared_by_digest() -> None:
    keys = Keys(["a", "b", "c"])
    scope = {"path": "/v1/models", "headers": [(b"authorization", b"Bearer a")]}
    with mock.patch.object(access.hmac, "compare_digest", side_effect=hmac.compare_digest) as compared:
        assert keys.check(scope) == hashlib.sha256(b"a").digest()
    assert compared.call_count == 3  # no early exit
    assert all(len(argument) == 32 for call in compared.call_args_list for argument in call.args)
    with pytest.raises(ApiError):
        keys.check({"path": "/v1/models", "headers": []})


def test_salts_differ_by_key_and_by_request() -> None:
    one, two = hashlib.sha256(b"1").digest(), hashlib.sha256(b"2").digest()
    salts = [cache_salt(key, salt) for key in (one, two, b"") for salt in (None, "", "x", "y")]
    assert len(set(salts)) == len(salts)
    assert cache_salt(b"", None) == b""
    assert cache_salt(one, "x") == cache_salt(one, "x")


async def test_callers_with_different_keys_share_no_prefix(
    make_service: MakeService, app_client: AppClient, engine: Any
) -> None:
    async with app_client(make_service(api_keys=KEYS)) as client:
        for key in (*KEYS, KEYS[0]):
            headers = {"Authorization": f"Bearer {key}"}
            answer = await client.post("/v1/completions", json={"prompt": "same"}, headers=headers)
            assert answer.status_code == 200
    first, second, again = (request.cache_salt for request in engine.requests)
    assert first == again != second
    assert first and second


async def test_keys_stay_out_of_answers(make_service: MakeService, app_client: AppClient) -> None:
    service = make_service(api_keys=("secret-canary",))
    assert "secret-canary" not in repr(service.settings)
    async with app_client(service) as client:
        for headers in ({}, {"Authorization": "Bearer secret-canary"}):
            for path in ("/v1/models", "/version", "/metrics", "/openapi.json", "/health", "/nothing"):
                assert "secret-canary" not in (await client.get(path, headers=headers)).text
