"""Any JSON in any known field: an answer below 500, or a refusal, and an engine that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus_server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

FIELDS = {
    "/v1/completions": sorted(CompletionRequest.model_fields),
    "/v1/chat/completions": sorted(ChatRequest.model_fields),
    "/tokenize": sorted(TokenizeRequest.model_fields),
    "/detokenize": sorted(DetokenizeRequest.model_fields),
}
MESSAGE = {"role": "user", "content": "x"}
STARTS: list[Any] = ["x", ["x"], [1, 2], [MESSAGE], 1, 0.5, True, "user", "text", {"type": "text"}, [[1]], -1, 258]

numbers = st.integers() | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([2**31, 2**63, -1, 259])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=20)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("type"), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from(sorted(FIELDS)))
    body: dict[str, Any] = {"prompt": "x", "messages": [MESSAGE], "tokens": [65], "max_tokens": 2}
    for name in draw(st.lists(st.sampled_from(FIELDS[path]), max_size=4)):
        body[name] = draw(values | st.sampled_from(STARTS))
    return path, json.dumps(body).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def wire(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10, headers={"content-type": "application/json"}) as client:
        yield client


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_no_request_is_our_fault(wire: httpx.Client, request: tuple[str, bytes]) -> None:
    path, body = request
    answer = wire.post(path, content=body)
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")


def test_afterwards_it_still_answers(wire: httpx.Client) -> None:
    assert wire.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 2}').status_code == 200
    assert wire.get("/readyz").status_code == 200
