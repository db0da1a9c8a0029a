"""How a request wants its tokens chosen: the caller's view and the device's view."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Annotated

import msgspec

from isthmus.errors import InvalidRequest

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_SEED = 2**63 - 1

Probability = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for.  Text fields are resolved to token ids by :meth:`resolve`.

    Raises :class:`InvalidRequest` on construction when a value is out of bounds.
    """

    n: int = 1
    max_tokens: int | None = 16
    """``None`` means as many as the model's context allows."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 or -1 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """``None``: none. 0: of the chosen token. k: of the chosen token and the k likeliest."""
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}",
                param="min_tokens",
            )
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), MAX_SEED)
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            _check_range("stop", len(text), 1, MAX_STOP_LENGTH)
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _check_count("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_count("logit_bias", tuple(self.logit_bias), MAX_LOGIT_BIAS)
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest(
                "allowed_token_ids is empty, so no token could be sampled; leave it out to allow every token",
                param="allowed_token_ids",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def resolve(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        eos_token_ids: Sequence[int] = (),
        bad_word_ids: Sequence[Sequence[int]] = (),
        index: int = 0,
    ) -> RowSampling:
        """The device's view of choice ``index`` of ``n``.

        ``max_tokens`` is the room left in the model's context; ``bad_word_ids`` is what the
        tokenizer made of ``bad_words``.  Raises :class:`InvalidRequest` for a token id outside
        the vocabulary.
        """
        stop_ids = tuple(dict.fromkeys((*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids))))
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logit_bias", tuple(self.logit_bias)),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(
                        f"{name} holds token id {token}; this model's ids are 0 to {vocab_size - 1}",
                        param=name,
                    )
        seed = secrets.randbits(63) if self.seed is None else (self.seed + index) % 2**63
        limit = max_tokens if self.max_tokens is None else min(self.max_tokens, max_tokens)
        return RowSampling(
            max_tokens=limit,
            min_tokens=min(self.min_tokens, limit),
            temperature=0.0 if self.greedy else self.temperature,
            top_k=0 if self.greedy or self.top_k < 0 or self.top_k >= vocab_size else self.top_k,
            top_p=1.0 if self.greedy else self.top_p,
            min_p=0.0 if self.greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            allowed_token_ids=self.allowed_token_ids or (),
            bad_word_ids=tuple(tuple(word[:MAX_BAD_WORD_TOKENS]) for word in bad_word_ids),
            seed=seed,
            num_logprobs=-1 if self.logprobs is None else self.logprobs,
            num_prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
            stop_token_ids=stop_ids,
        )


class RowSampling(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers only: what the engine and the device know of a sequence's sampling.

    Token ids are within the vocabulary; bounds were checked by :class:`SamplingParams`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy, and then ``top_k``, ``top_p`` and ``min_p`` are at their neutral values."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    """Empty allows every token."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    num_logprobs: int = -1
    """-1: none. 0: the chosen token's. k: and those of the k likeliest tokens."""
    num_prompt_logprobs: int = -1
    stop_token_ids: tuple[int, ...] = ()
    """End-of-sequence ids included, unless the caller ignores them."""

    @property
    def needs_history(self) -> bool:
        """Whether sampling reads the tokens so far, and not this step's logits alone."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.bad_word_ids)
        )


def _check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = math.isfinite(value) and (value > low if low_open else value >= low) and value <= high
    if not inside:
        bracket = "more than" if low_open else "at least"
        raise InvalidRequest(f"{name} is {value}; it must be {bracket} {low} and at most {high}", param=name)


def _check_count(name: str, values: Sequence[object], most: int) -> None:
    if len(values) > most:
        raise InvalidRequest(f"{name} has {len(values)} entries; at most {most} are taken", param=name)
