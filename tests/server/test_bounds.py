"""Whatever a client sends: a quick 400 that names the field, and an engine that goes on."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from isthmus.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from isthmus_server.protocol.fields import MAX_PROMPTS, MAX_SALT

QUICK_S = 1.0
HUGE = 2**63
WRONG_TYPES: list[Any] = ["text", [1], {"a": 1}, True]
NOT_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999"]

# Field: (what is taken, what is just not).
NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 2], [0, -1, MAX_N + 1, 10**9, HUGE, 1.5]),
    "max_tokens": ([1, 2**31 - 1], [0, -1, 2**31, HUGE, 1.5]),
    "min_tokens": ([0, 1], [-1, 2**31, HUGE, 1.5]),
    "temperature": ([0, 0.0, 1, 100], [-0.001, 100.5, HUGE]),
    "top_p": ([0.001, 1], [0, -1, 1.001, HUGE]),
    "top_k": ([-1, 0, 2**31 - 1], [-2, 2**31, HUGE, 1.5]),
    "min_p": ([0, 1], [-0.001, 1.001, HUGE]),
    "repetition_penalty": ([0.001, 100], [0, -1, 100.5, HUGE]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001, HUGE]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001, HUGE]),
    "seed": ([-(2**63), MAX_SEED], [HUGE, -(2**63) - 1, 10**30, 1.5]),
    "logprobs": ([0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1, 10**9, HUGE, 1.5]),
    "prompt_logprobs": ([0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1, 10**9, HUGE, 1.5]),
    "priority": ([-(2**31), 2**31 - 1], [2**31, HUGE, 1.5]),
}
LISTS: dict[str, tuple[list[Any], list[Any]]] = {
    "stop": (
        ["x", ["x"] * MAX_STOP_STRINGS, "x" * MAX_STOP_LENGTH, None],
        [["x"] * (MAX_STOP_STRINGS + 1), "x" * (MAX_STOP_LENGTH + 1), "", [""], [1], {"a": 1}, 3, ["x"] * 500_000],
    ),
    "stop_token_ids": (
        [[], [1] * MAX_STOP_TOKEN_IDS, None],
        [[1] * (MAX_STOP_TOKEN_IDS + 1), [-1], [2**31], [999_999], [1.5], ["1"], [True], "1", [1] * 10**6],
    ),
    "allowed_token_ids": ([[65], None], [[], [-1], [999_999], ["a"], 1]),
    "logit_bias": (
        [{}, {"65": 1}, {str(i % 259): 0 for i in range(259)}, None],
        [
            *({"65": 100.5}, {"-1": 1}, {"999999": 1}, {"a": 1}, {"65": "x"}, {"65": True}, [1], "x"),
            {str(i): 0 for i in range(MAX_LOGIT_BIAS + 1)},
        ],
    ),
    "bad_words": ([["x"], [], None], [["x"] * (MAX_BAD_WORDS + 1), [""], [1], "x", ["x" * 513], ["x"] * 50_000]),
    "cache_salt": (["x", "x" * MAX_SALT, None], ["", "x" * (MAX_SALT + 1), "\u20ac" * 100, 1, ["x"]]),
    "user": (["x" * 256], ["x" * 257, 1]),
    "model": (["toy", None], [1, ["toy"], "x" * 300]),
    "stream": ([False, True, None], ["yes", 1, [True]]),
    "echo": ([False, True, None], ["yes", 1]),
    "stream_options": ([None], [{"include_usage": True}, 1, "x", {"include_usage": 3}]),
    "response_format": ([None, {"type": "text"}], [{"type": "json_object"}, {"type": "json_schema"}, {}, "text"]),
    "suffix": ([None, ""], ["tail", 1]),
    "best_of": ([1, None], [2, 0, HUGE]),
    "use_beam_search": ([False, None], [True]),
    "guided_json": ([None], [{}, "x", 0, False]),
    "structured_outputs": ([None], [{"json": {}}]),
    "prompt_embeds": ([None], ["AAAA"]),
}
PROMPTS_TAKEN: list[Any] = ["x", ["x", "y"], [1, 2], [[1], [2]], [0], [258]]
PROMPTS_REFUSED: list[Any] = [
    *([], [[]], "", [""], None, 1, True, {"a": 1}, [True], [1, "x"], ["x", 1], [[1], "x"], [[1], [True]], [1.5]),
    *([-1], [259], [999_999], [2**31], [HUGE], [[259]], ["x"] * (MAX_PROMPTS + 1), "x" * 5000, [1] * 4096),
    *("x" * 10**6, [1] * 10**6, [[1] * 5000], [None], [[None]], [[[1]]]),
]


def post(http: httpx.Client, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    started = time.monotonic()
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert time.monotonic() - started < QUICK_S + len(content) / 5e6, f"slow: {content[:100]!r}"
    return answer


def refused(answer: httpx.Response, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 4000  # never the value that was sent
    if param is not None:
        assert error["param"] and error["param"].split(".")[0] == param, error
    return dict(error)


@pytest.fixture(scope="module")
def canary(server: Any) -> Any:
    """Called after each case: the engine still gives the same answer."""
    with httpx.Client(base_url=server.url) as client:

        def sing() -> str:
            answer = client.post("/v1/completions", json={"prompt": "canary", "max_tokens": 8, "temperature": 0})
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        first = sing()
        yield lambda: sing() == first


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(http: httpx.Client, canary: Any, name: str) -> None:
    taken, not_taken = NUMBERS[name]
    base = {"prompt": "x"} if name == "max_tokens" else {"prompt": "x", "max_tokens": 2}
    for value in taken:
        assert post(http, {"ignore_eos": False, **base, name: value}).status_code == 200, (name, value)
    for value in [*not_taken, *WRONG_TYPES]:
        refused(post(http, {**base, name: value}), name)
    for text in NOT_NUMBERS:
        body = json.dumps({**base, name: "@"}).replace('"@"', text).encode()
        refused(post(http, body))
    assert canary()


@pytest.mark.parametrize("name", LISTS)
def test_lists_and_options(http: httpx.Client, canary: Any, name: str) -> None:
    taken, not_taken = LISTS[name]
    for value in taken:
        assert post(http, {"prompt": "x", "max_tokens": 2, name: value}).status_code == 200, (name, value)
    for value in not_taken:
        answer = post(http, {"prompt": "x", "max_tokens": 2, name: value})
        if name == "model" and isinstance(value, str) and len(value) <= 256:
            assert answer.status_code == 404
        else:
            refused(answer, name)
    assert canary()


def test_prompts(http: httpx.Client, canary: Any) -> None:
    for prompt in PROMPTS_TAKEN:
        assert post(http, {"prompt": prompt, "max_tokens": 1}).status_code == 200, prompt
    for prompt in PROMPTS_REFUSED:
        refused(post(http, {"prompt": prompt, "max_tokens": 1}), "prompt")
    refused(post(http, {"max_tokens": 1}), "prompt")
    refused(post(http, {"prompt": ["x"] * 100, "n": 100, "max_tokens": 1}), "n")
    assert canary()


def test_bodies_that_are_no_request(http: httpx.Client, canary: Any) -> None:
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    surrogate, zero = b'{"prompt": "\\ud800"}', b'{"prompt": "\\u0000", "max_tokens": 1}'
    for body in (
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        deep,
        surrogate,
        b'{"prompt": "\xff"}',
        b"9" * 100_000,
    ):
        refused(post(http, body))
    assert post(http, zero).status_code == 200
    for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": media})
        assert answer.status_code == 415
    assert canary()


MESSAGES_REFUSED: list[Any] = [
    *([], None, "x", {}, [1], [{}], [{"content": "x"}], [{"role": "", "content": "x"}], [{"role": 1, "content": "x"}]),
    *([{"role": "user", "content": 1}], [{"role": "user", "content": [1]}], [{"role": "user", "content": [{}]}]),
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
    [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
    [{"role": "user", "content": "x" * 100_000}],
    [{"role": "x" * 65, "content": "x"}],
    [{"role": "user", "content": "x"}] * 8193,
]


def test_messages(http: httpx.Client, canary: Any) -> None:
    for messages in MESSAGES_REFUSED:
        refused(post(http, {"messages": messages, "max_tokens": 1}, "/v1/chat/completions"))
    assert canary()


CHAT_REFUSED: dict[str, list[Any]] = {
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, 1],
    "tools": [[{}], [{"type": "x"}], 1, [{"type": "function", "function": {}}]],
    "top_logprobs": [3, 21, -1],
    "chat_template": ["{{ 1 }}"],
    "chat_template_kwargs": [{"messages": []}, {"tokenize": True}, {"a-b": 1}, {"__class__": 1}, 1],
    "functions": [[]],
    "function_call": ["auto"],
    "modalities": [["audio"], ["text", "audio"], ["text"] * 10],
    "response_format": [{"type": "json_schema", "json_schema": {}}],
    "max_completion_tokens": [0, -1, 2**31],
    "documents": [[{}]],
    "audio": [{}],
    "echo": [True],
}


@pytest.mark.parametrize("name", CHAT_REFUSED)
def test_chat_options(http: httpx.Client, canary: Any, name: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    for value in CHAT_REFUSED[name]:
        answer = post(http, {"messages": messages, "max_tokens": 1, name: value}, "/v1/chat/completions")
        refused(answer, name)
    assert canary()


def test_tools_go_to_the_template_and_text_comes_back(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "auto", "max_tokens": 2}
    assert post(http, body, "/v1/chat/completions").status_code == 200


def test_paths_and_methods(http: httpx.Client) -> None:
    missing = http.get("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


def test_a_body_without_end_is_refused_while_it_comes(http: httpx.Client, canary: Any, server: Any) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 2**30:
            sent += 2**20
            yield b" " * 2**20

    before = psutil.Process(server.process.pid).memory_info().rss
    try:
        answer = http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # the server answered and closed while this end was still writing
    assert sent < 2**27
    assert psutil.Process(server.process.pid).memory_info().rss - before < 150 * 2**20
    # A length alone is enough to be refused: nothing of the body has to come.
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    assert canary()


def test_a_head_without_end_is_refused(http: httpx.Client, canary: Any) -> None:
    assert http.get("/version", headers={"x": "y" * 200_000}).status_code == 431
    assert http.get("/version", headers={f"x-{i}": "y" for i in range(200)}).status_code == 431
    assert http.get("/version", headers={f"x-{i}": "y" for i in range(60)}).status_code == 200
    assert canary()
