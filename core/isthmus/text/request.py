"""From a prompt and sampling parameters to what the engine takes: shared by the offline engine and the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.errors import InvalidRequest
from isthmus.sampling_params import MAX_BAD_WORD_TOKENS, SamplingParams

if TYPE_CHECKING:
    from isthmus.text.tokenizer import Tokenizer

MAX_CACHE_SALT_BYTES = 256
MAX_BAD_WORD_CHARACTERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt that fits the model: at least one token, each in the vocabulary, and room for one more."""

    token_ids: Sequence[int]
    text: str | None
    """As given or rendered; ``None`` if it came as token ids."""


@contextmanager
def naming(what: str, index: int, count: int) -> Iterator[None]:
    """Say which of several was refused."""
    try:
        yield
    except InvalidRequest as error:
        if count == 1:
            raise
        raise InvalidRequest(f"{what} {index}: {error}", param=error.param) from error


class RequestBuilder:
    """Checks prompts against one model's limits and makes engine requests of them.

    Limits are the engine's own (``EngineReady``).  ``tokenizer`` is ``None`` where only token ids
    are served.  All methods raise :class:`InvalidRequest` for what a caller got wrong.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        own = () if tokenizer is None else tokenizer.eos_token_ids
        self._eos_token_ids = tuple(dict.fromkeys(i for i in (*own, *eos_token_ids) if 0 <= i < vocab_size))

    def prompt(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> Prompt:
        """A prompt from text or token ids."""
        return self.prompts([prompt], add_special_tokens=add_special_tokens)[0]

    def prompts(self, prompts: Sequence[str | Sequence[int]], *, add_special_tokens: bool = True) -> list[Prompt]:
        """Many prompts, those that are text encoded in parallel; an error says which one."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(self._encode(texts, add_special_tokens) if texts else ())
        found = []
        for index, prompt in enumerate(prompts):
            with naming("prompt", index, len(prompts)):
                text = prompt if isinstance(prompt, str) else None
                ids = next(encoded) if isinstance(prompt, str) else prompt
                if text is None:
                    self._check_ids(ids)
                self._check_length(len(ids))
            found.append(Prompt(token_ids=ids, text=text))
        return found

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A prompt from chat messages, by the model's template or the one given."""
        from isthmus.text.template import render_chat  # jinja2 is loaded by those who chat

        tokenizer = self._need_tokenizer("chats")
        template = template or tokenizer.chat_template_for(tools=bool(tools))
        if template is None:
            raise InvalidRequest(
                "this model brings no chat template; give one, or send the conversation as a text prompt",
                param="messages",
            )
        text = render_chat(
            messages,
            template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens=tokenizer.special_tokens,
            template_kwargs=template_kwargs,
        )
        return self.prompt(text, add_special_tokens=False)

    def echo(self, prompt: Prompt, params: SamplingParams) -> str:
        """The prompt as text, for an answer that repeats it."""
        if prompt.text is not None:
            return prompt.text
        return self._need_tokenizer("echo").decode(prompt.token_ids, params.skip_special_tokens)

    def requests(
        self,
        prompt: Prompt,
        params: SamplingParams,
        next_id: Callable[[], int],
        *,
        priority: int = 0,
        cache_salt: bytes = b"",
        arrival_s: float | None = None,
    ) -> list[AddRequest]:
        """One engine request a choice, in order; choice ``i`` of a seeded request has seed ``seed + i``."""
        if len(cache_salt) > MAX_CACHE_SALT_BYTES:
            raise InvalidRequest(
                f"cache_salt has {len(cache_salt)} bytes; at most {MAX_CACHE_SALT_BYTES} are taken", param="cache_salt"
            )
        if params.stop:
            self._need_tokenizer("stop strings")
        packed = pack_tokens(prompt.token_ids)
        bad_word_ids = self._bad_word_ids(params)
        arrival_s = time.monotonic() if arrival_s is None else arrival_s
        return [
            AddRequest(
                request_id=next_id(),
                prompt=packed,
                sampling=params.resolve(
                    vocab_size=self._vocab_size,
                    max_tokens=self._max_model_len - len(prompt.token_ids),
                    eos_token_ids=self._eos_token_ids,
                    bad_word_ids=bad_word_ids,
                    index=index,
                ),
                priority=priority,
                cache_salt=cache_salt,
                arrival_s=arrival_s,
            )
            for index in range(params.n)
        ]

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{what} need a tokenizer, and this engine runs without one; send token ids")
        return self.tokenizer

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        tokenizer = self._need_tokenizer("prompts as text")
        for index, text in enumerate(texts):
            # A bound that needs no encoding, so that an endless text costs nothing.
            if len(text) > 16 * self._max_model_len:
                with naming("prompt", index, len(texts)):
                    self._check_length(tokenizer.fewest_tokens(text), at_least="at least ")
        return tokenizer.encode_batch(texts, add_special_tokens)

    def _check_ids(self, ids: Sequence[int]) -> None:
        strange = next((token for token in ids if type(token) is not int), None)
        if strange is not None:
            raise InvalidRequest(f"the prompt holds {strange!r}, which is not a token id", param="prompt")
        outside = [token for token in (min(ids, default=0), max(ids, default=0)) if not 0 <= token < self._vocab_size]
        if outside:
            raise InvalidRequest(
                f"the prompt holds token id {outside[0]}; this model's ids are 0 to {self._vocab_size - 1}",
                param="prompt",
            )

    def _check_length(self, count: int, at_least: str = "") -> None:
        if count == 0:
            raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        if count >= self._max_model_len:
            raise InvalidRequest(
                f"the prompt has {at_least}{count} tokens; this model takes {self._max_model_len}, prompt and "
                f"output together: shorten the prompt to {self._max_model_len - 1} tokens or fewer, or start the "
                "engine with a larger max_model_len if the model allows it",
                param="prompt",
            )

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """Each word as it is spelt inside a text: by itself, and after a space."""
        if not params.bad_words:
            return []
        tokenizer = self._need_tokenizer("bad_words")
        spellings: list[str] = []
        for word in params.bad_words:
            if not word.strip() or len(word) > MAX_BAD_WORD_CHARACTERS:
                raise InvalidRequest(
                    f"bad_words holds a word of {len(word)} characters; a word has 1 to {MAX_BAD_WORD_CHARACTERS}, "
                    "not all of them spaces",
                    param="bad_words",
                )
            bare = word.lstrip(" ")
            spellings += (bare, f" {bare}") if bare == word else (f" {bare}",)
        found = {tuple(ids): ids for ids in map(tokenizer.encode_inside, spellings)}
        for ids in found.values():
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise InvalidRequest(
                    f"bad_words holds a word of {len(ids)} tokens; at most {MAX_BAD_WORD_TOKENS} are taken",
                    param="bad_words",
                )
        return list(found.values())
