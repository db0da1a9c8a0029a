"""The API's options against a real server."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from isthmus_server.protocol import responses

Events = Callable[[str], list[dict[str, Any]]]


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_stream_equals_whole_for_random_stop_strings(http: httpx.Client, events: Events) -> None:
    draw = random.Random(5)
    text = complete(http, prompt="stop here", max_tokens=60)["choices"][0]["text"]
    for _ in range(25):
        start = draw.randrange(len(text) - 4)
        stops = [text[start : start + draw.randint(1, 4)], "never \u00e9"]
        body = {"prompt": "stop here", "max_tokens": 60, "stop": stops, "temperature": 0}
        body["include_stop_str_in_output"] = draw.random() < 0.5
        whole = complete(http, **body)["choices"][0]
        found = events(http.post("/v1/completions", json={**body, "stream": True}).text)
        assert "".join(event["choices"][0]["text"] for event in found) == whole["text"]
        assert found[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "stop"
        assert found[-1]["choices"][0]["stop_reason"] == whole["stop_reason"] == stops[0]
        cut = text.index(stops[0]) + (len(stops[0]) if body["include_stop_str_in_output"] else 0)
        assert whole["text"] == text[:cut]


@pytest.mark.parametrize("chat", [False, True])
def test_usage_with_every_chunk(http: httpx.Client, events: Events, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True, "stream": True, "prompt": "x"}
    body["messages"] = [{"role": "user", "content": "x"}]
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(http.post(path, json={**body, "stream_options": options}).text)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == ([1] if chat else []) + [1, 2, 3, 4, 5, 5]
    at_end = events(http.post(path, json={**body, "stream_options": {"include_usage": True}}).text)
    assert [event["usage"] is None for event in at_end] == [True] * (len(at_end) - 1) + [False]
    assert at_end[-1]["usage"]["total_tokens"] == found[-1]["usage"]["total_tokens"]
    assert all("usage" not in event for event in events(http.post(path, json=body).text))


def test_limits_on_length(http: httpx.Client) -> None:
    long = complete(http, prompt="x", max_tokens=700, ignore_eos=True)
    assert long["usage"]["completion_tokens"] == 700
    assert long["choices"][0]["finish_reason"] == "length"
    # A limit beyond the context is cut to what is left of it.
    rest = complete(http, prompt="x" * 4000, max_tokens=100_000, ignore_eos=True)
    assert rest["usage"]["total_tokens"] == 4096


def test_min_tokens_holds_back_a_stop_token(http: httpx.Client) -> None:
    first = complete(http, prompt="y", max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"][0]
    stopped = complete(http, prompt="y", max_tokens=20, stop_token_ids=[first])["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == first
    held = complete(http, prompt="y", max_tokens=20, stop_token_ids=[first], min_tokens=5, ignore_eos=True)
    assert held["usage"]["completion_tokens"] >= 5


def test_allowed_tokens(http: httpx.Client) -> None:
    allowed = [ord("a"), ord("b")]
    text = complete(http, prompt="z", max_tokens=30, allowed_token_ids=allowed, ignore_eos=True)["choices"][0]["text"]
    assert set(text) <= {"a", "b"} and len(text) == 30


def test_a_seed_gives_the_same_text_again(http: httpx.Client) -> None:
    body = {"prompt": "seed", "max_tokens": 24, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    texts = {complete(http, **body, seed=11)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1


def test_prompt_logprobs(http: httpx.Client) -> None:
    (choice,) = complete(http, prompt="abc", max_tokens=1, prompt_logprobs=2)["choices"]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert str(ord("b")) in second and second[str(ord("b"))]["decoded_token"] == "b"
    assert str(ord("c")) in third
    assert min(entry["rank"] for entry in third.values()) == 1


def test_tokens_as_ids(http: httpx.Client) -> None:
    (choice,) = complete(http, prompt="abc", max_tokens=2, logprobs=0, return_tokens_as_token_ids=True)["choices"]
    assert all(token.startswith("token_id:") for token in choice["logprobs"]["tokens"])


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "snowman \u2603, and a tab\t"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == len(text.encode())
    assert found["max_model_len"] == 4096
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == "<s>user: hi\nassistant: "


def test_chat_template_options(http: httpx.Client) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]

    def prompt(**more: Any) -> str:
        tokens = http.post("/tokenize", json={"messages": messages, **more}).json()["tokens"]
        return str(http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])

    assert prompt() == "<s>user: hi\nassistant: "
    assert prompt(add_generation_prompt=False) == "<s>user: hi\n"
    messages.append({"role": "assistant", "content": "Well"})
    assert prompt(continue_final_message=True) == "<s>user: hi\nassistant: Well"


def test_the_prefix_cache_is_counted_and_split_by_salt(http: httpx.Client) -> None:
    body = {"prompt": "a prefix that is longer than a few blocks of sixteen tokens " * 3, "max_tokens": 1}
    complete(http, **body, cache_salt="one")
    again = complete(http, **body, cache_salt="one")["usage"]["prompt_tokens_details"]["cached_tokens"]
    other = complete(http, **body, cache_salt="two")["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again >= 16 and other == 0


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/version", headers={"X-Request-Id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for bad in ("a b", "x" * 200, "\u00e9", "a\tb"):
        made = http.get("/version", headers={"X-Request-Id": bad.encode()}).headers["x-request-id"]
        assert made != bad and len(made) == 32
    # The same id twice at the same time is no clash: the engine never sees it.
    for _ in range(2):
        answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers={"X-Request-Id": "dup"})
        assert answer.status_code == 200


def test_probes_and_version(http: httpx.Client) -> None:
    for path in ("/health", "/livez", "/readyz", "/ping"):
        assert http.get(path).status_code == 200, path
    assert set(http.get("/version").json()) == {"version"}


def test_openapi_describes_every_body_and_error(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            node = list(node.values())
        if isinstance(node, list):
            for inner in node:
                yield from references(inner)

    known = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert set(references(schema)) <= known
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        post = schema["paths"][path]["post"]
        assert {"400", "401", "404", "405", "413", "415", "500", "503"} <= set(post["responses"])
        assert "$ref" in post["requestBody"]["content"]["application/json"]["schema"]
        assert "$ref" in post["responses"]["200"]["content"]["application/json"]["schema"]
    assert "text/event-stream" in schema["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 2, "seed": 1},
    {"logprobs": True, "top_logprobs": 2},
    {"return_token_ids": True},
    {"stop": ["a"]},
    {"prompt_logprobs": 1},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "return_token_ids": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_answers_are_what_the_description_says(http: httpx.Client, events: Events, options: dict[str, Any]) -> None:
    base = {"max_tokens": 6, "ignore_eos": True}
    for chat in (True, False):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {**base, **options, **({"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "xy"})}
        if not chat and "top_logprobs" in body:
            body["logprobs"] = body.pop("top_logprobs")
        if "stream_options" not in body:
            answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code == 200, answer.text
            (responses.ChatCompletion if chat else responses.Completion).model_validate_json(answer.content)
        if "prompt_logprobs" not in body:
            found = events(http.post(path, json={**body, "stream": True}).text)
            model = responses.ChatCompletionChunk if chat else responses.Completion
            parsed = [model.model_validate(event) for event in found]
            ends = [choice.index for event in parsed for choice in event.choices if choice.finish_reason]
            assert sorted(ends) == list(range(body.get("n", 1)))  # one end a choice
    responses.ModelList.model_validate_json(http.get("/v1/models").content)
    responses.ErrorBody.model_validate_json(http.get("/nothing").content)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_fields_are_ignored(http: httpx.Client, path: str) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x", "extra": 1}], "max_tokens": 1, "novel": [1]}
    assert http.post(path, json=body).status_code == 200
