"""OpenAI's own client against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest


@pytest.fixture(scope="module")
def sdk(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_chat_whole_and_streamed_are_equal(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=40, temperature=0)
    stream = sdk.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content != ""
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_completion_whole_and_streamed_are_equal(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model="toy", prompt="once upon", max_tokens=30, temperature=0)
    chunks = list(sdk.completions.create(model="toy", prompt="once upon", max_tokens=30, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_async_client(server: Any) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.completions.create(model="toy", prompt="abc", max_tokens=8, seed=3)
            pieces = []
            async for chunk in await client.chat.completions.create(
                model="toy", messages=MESSAGES, max_completion_tokens=8, stream=True
            ):
                pieces += [choice.delta.content or "" for choice in chunk.choices]
            return whole.choices[0].text, "".join(pieces)

    text, answer = asyncio.run(both())
    assert text and answer


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_have_their_own_text(sdk: openai.OpenAI, stream: bool) -> None:
    texts = ["", "", ""]
    request: Any = {"model": "toy", "messages": MESSAGES, "n": 3, "max_tokens": 12, "seed": 7, "temperature": 1.0}
    if stream:
        for chunk in sdk.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = sdk.chat.completions.create(**request)
        for choice in answer.choices:
            texts[choice.index] = choice.message.content or ""
        assert answer.usage is not None
        one = sdk.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=1)
        assert one.usage is not None
        assert answer.usage.prompt_tokens == one.usage.prompt_tokens  # counted once, not three times
    assert all(texts)


def test_prompts_of_every_form_give_the_same(sdk: openai.OpenAI, http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "a few words"}).json()["tokens"]
    forms: list[Any] = ["a few words", tokens, ["a few words"], [tokens]]
    texts = [
        sdk.completions.create(model="toy", prompt=form, max_tokens=9, temperature=0).choices[0].text for form in forms
    ]
    assert len(set(texts)) == 1
    two = sdk.completions.create(model="toy", prompt=["a few words", "others"], max_tokens=9, temperature=0, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == texts[0]
    assert two.choices[2].text == two.choices[3].text != texts[0]


def test_logprobs_of_a_chat(sdk: openai.OpenAI) -> None:
    request: Any = {"model": "toy", "messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    answer = sdk.chat.completions.create(**request, temperature=0)
    entries = answer.choices[0].logprobs
    assert entries is not None and entries.content is not None
    assert "".join(entry.token for entry in entries.content) == answer.choices[0].message.content
    for entry in entries.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        assert bytes(entry.bytes or ()).decode() == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[-1].logprob
    streamed = [
        entry
        for chunk in sdk.chat.completions.create(**request, temperature=0, stream=True)
        for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries.content]


def test_echo_with_logprobs_covers_the_prompt(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="toy", prompt="abcd", max_tokens=2, echo=True, logprobs=1, temperature=0)
    (choice,) = answer.choices
    assert choice.text.startswith("abcd") and len(choice.text) == 6
    found = choice.logprobs
    assert found is not None and found.token_logprobs is not None and found.text_offset is not None
    assert "".join(found.tokens or ()) == choice.text
    assert found.token_logprobs[0] is None and all(value is not None for value in found.token_logprobs[1:])
    assert found.text_offset == list(range(6))
    only = sdk.completions.create(model="toy", prompt="abcd", max_tokens=0, echo=True, logprobs=1, temperature=0)
    assert only.choices[0].text == "abcd"
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.token_logprobs == found.token_logprobs[:4]
    assert only.usage is not None and only.usage.completion_tokens == 0


def test_errors_are_the_clients_own_classes(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.completions.create(model="another", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.completions.create(model="toy", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"


def test_models(sdk: openai.OpenAI) -> None:
    (model,) = sdk.models.list().data
    assert model.id == "toy"
    assert sdk.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")
