"""The two endpoints' answers as JSON.

What is the same in every chunk of a stream is encoded once; a chunk is then three joined byte
strings, of which one is the encoded text.
"""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec

from isthmus.text.output import Delta, TokenLogprob
from isthmus_server.generation import Choice, Generation
from isthmus_server.logprobs import ChatLogprobs, CompletionLogprobs, prompt_logprobs_body
from isthmus_server.protocol import UsageWish

_encode: Final = msgspec.json.Encoder().encode

_EVENT: Final = b"data: "
_END: Final = b"\n\n"


class _Collected:
    """One choice of a whole answer as it fills."""

    __slots__ = ("finish_reason", "logprobs", "pieces", "prompt_logprobs", "stop_reason", "token_ids")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


class _Collector:
    def __init__(self) -> None:
        self._collected: dict[int, _Collected] = {}

    def add(self, choice: Choice, delta: Delta) -> None:
        self[choice].add(delta)

    def __getitem__(self, choice: Choice) -> _Collected:
        return self._collected.setdefault(choice.index, _Collected())


def _stem(answer_id: str, kind: str, model: str, created: int) -> bytes:
    """The fields that every object of an answer starts with, without the closing brace."""
    head = {"id": answer_id, "object": kind, "created": created, "model": model, "system_fingerprint": None}
    return _encode(head)[:-1]


class _Ending:
    """How a chunk ends, after its choices."""

    def __init__(self, wish: UsageWish) -> None:
        self.varies = wish is UsageWish.ALWAYS
        self.plain = (b"}" if wish is UsageWish.NONE else b',"usage":null}') + _END

    def of(self, choice: Choice) -> bytes:
        return b',"usage":' + _encode(choice.usage.body()) + b"}" + _END if self.varies else self.plain


class ChatWriter:
    def __init__(
        self,
        answer_id: str,
        model: str,
        *,
        logprobs: ChatLogprobs | None,
        usage: UsageWish,
        return_token_ids: bool,
    ) -> None:
        self._created = int(time.time())
        self._id = answer_id
        self._model = model
        self._logprobs = logprobs
        self._usage_wish = usage
        self._ending = _Ending(usage)
        self._return_token_ids = return_token_ids
        self._head = _EVENT + _stem(answer_id, "chat.completion.chunk", model, self._created) + b',"choices":[{"index":'
        self._plain = b'},"logprobs":null,"finish_reason":null}]'
        self._plain_tail = self._plain + self._ending.plain
        self._heads: dict[int, bytes] = {}
        self._collector = _Collector()

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        opening = b""
        tail = self._plain + self._ending.of(choice) if self._ending.varies else self._plain_tail
        head = self._heads.get(choice.index)
        if head is None:
            head = self._heads[choice.index] = self._head + str(choice.index).encode() + b',"delta":{'
            opening = head + b'"role":"assistant","content":""' + tail
        if delta.finish_reason is None and not delta.logprobs and not self._return_token_ids:
            if not delta.text:
                return opening
            return b"".join((opening, head, b'"content":', _encode(delta.text), tail))
        return opening + self._full_chunk(head, choice, delta)

    def _full_chunk(self, head: bytes, choice: Choice, delta: Delta) -> bytes:
        rest: dict[str, Any] = {
            "logprobs": self._logprobs.body(delta.logprobs) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            rest["stop_reason"] = delta.stop_reason
        if self._return_token_ids:
            rest["token_ids"] = delta.token_ids
        content = b'"content":' + _encode(delta.text) if delta.text else b""
        return b"".join((head, content, b"},", _encode(rest)[1:], b"]", self._ending.of(choice)))

    def usage_chunk(self, generation: Generation) -> bytes:
        if self._usage_wish is UsageWish.NONE:
            return b""
        stem = _stem(self._id, "chat.completion.chunk", self._model, self._created)
        return _EVENT + stem + b',"choices":[],"usage":' + _encode(generation.usage.body()) + b"}" + _END

    def keep(self, choice: Choice, delta: Delta) -> None:
        self._collector.add(choice, delta)

    def whole(self, generation: Generation) -> bytes:
        choices = []
        for choice in generation.choices:
            got = self._collector[choice]
            body: dict[str, Any] = {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(got.pieces), "refusal": None},
                "logprobs": self._logprobs.body(got.logprobs) if self._logprobs else None,
                "finish_reason": got.finish_reason,
                "stop_reason": got.stop_reason,
            }
            if self._return_token_ids:
                body["token_ids"] = got.token_ids
            choices.append(body)
        rest: dict[str, Any] = {"choices": choices, "usage": generation.usage.body()}
        first = generation.choices[0]
        if generation.params.prompt_logprobs is not None:
            rest["prompt_logprobs"] = prompt_logprobs_body(self._collector[first].prompt_logprobs)
        if self._return_token_ids:
            rest["prompt_token_ids"] = list(first.prompt.token_ids)
        return _stem(self._id, "chat.completion", self._model, self._created) + b"," + _encode(rest)[1:]


class CompletionWriter:
    """``echoes`` is the prompt's text by prompt, or empty; ``only_echo`` drops what was generated."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        *,
        logprobs: CompletionLogprobs | None,
        usage: UsageWish,
        return_token_ids: bool,
        prompt_logprobs: bool,
        echoes: list[str],
        only_echo: bool = False,
    ) -> None:
        self._created = int(time.time())
        self._stem = _stem(answer_id, "text_completion", model, self._created)
        self._logprobs = logprobs
        self._usage_wish = usage
        self._ending = _Ending(usage)
        self._return_token_ids = return_token_ids
        self._prompt_logprobs = prompt_logprobs
        self._echoes = echoes
        self._only_echo = only_echo
        self._plain = b',"logprobs":null,"finish_reason":null}]'
        self._plain_tail = self._plain + self._ending.plain
        self._head = _EVENT + self._stem + b',"choices":[{"index":'
        self._heads: dict[int, bytes] = {}
        self._offsets: dict[int, int] = {}
        self._collector = _Collector()

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        text = "" if self._only_echo else delta.text
        head = self._heads.get(choice.index)
        if head is None:
            head = self._heads[choice.index] = self._head + str(choice.index).encode() + b',"text":'
            text = self._echo(choice) + text
        if delta.finish_reason is None and not delta.logprobs and not self._return_token_ids:
            tail = self._plain + self._ending.of(choice) if self._ending.varies else self._plain_tail
            return b"".join((head, _encode(text), tail)) if text else b""
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": delta.finish_reason}
        if self._logprobs is not None:
            offset = self._offsets.get(choice.index, 0)
            rest["logprobs"], self._offsets[choice.index] = self._logprobs.body(delta.logprobs, offset)
        if delta.finish_reason is not None:
            rest["stop_reason"] = delta.stop_reason
        if self._return_token_ids:
            rest["token_ids"] = delta.token_ids
        return b"".join((head, _encode(text), b",", _encode(rest)[1:], b"]", self._ending.of(choice)))

    def usage_chunk(self, generation: Generation) -> bytes:
        if self._usage_wish is UsageWish.NONE:
            return b""
        return _EVENT + self._stem + b',"choices":[],"usage":' + _encode(self._usage(generation)) + b"}" + _END

    def keep(self, choice: Choice, delta: Delta) -> None:
        self._collector.add(choice, delta)

    def whole(self, generation: Generation) -> bytes:
        choices = [self._choice(choice, generation) for choice in generation.choices]
        return self._stem + b"," + _encode({"choices": choices, "usage": self._usage(generation)})[1:]

    def _choice(self, choice: Choice, generation: Generation) -> dict[str, Any]:
        got = self._collector[choice]
        text = "" if self._only_echo else "".join(got.pieces)
        logprobs = [] if self._only_echo else list(got.logprobs)
        body: dict[str, Any] = {
            "index": choice.index,
            "text": self._echo(choice) + text,
            "logprobs": None,
            "finish_reason": "length" if self._only_echo else got.finish_reason,
            "stop_reason": None if self._only_echo else got.stop_reason,
        }
        if self._logprobs is not None:
            echoed = list(got.prompt_logprobs) if self._echoes else []
            body["logprobs"], _ = self._logprobs.body([*echoed, *logprobs], 0, list(choice.prompt.token_ids))
        if self._prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs_body(got.prompt_logprobs)
        if self._return_token_ids:
            body["token_ids"] = got.token_ids
            body["prompt_token_ids"] = list(choice.prompt.token_ids)
        return body

    def _usage(self, generation: Generation) -> dict[str, object]:
        usage = generation.usage.body()
        if self._only_echo:
            usage["completion_tokens"], usage["total_tokens"] = 0, usage["prompt_tokens"]
        return usage

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.prompt_index] if self._echoes else ""
