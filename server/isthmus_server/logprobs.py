"""Log-probabilities in the two shapes of the API.

A minus infinity has no JSON: like other servers, -9999 stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.text.output import TokenLogprob, TopLogprob
from isthmus.text.tokenizer import Tokenizer

LEAST = -9999.0


def _value(logprob: float) -> float:
    # A comparison that is false for NaN too.
    return logprob if logprob > LEAST else LEAST


class _Spelling:
    def __init__(self, *, as_ids: bool) -> None:
        self._as_ids = as_ids

    def __call__(self, entry: TokenLogprob | TopLogprob) -> str:
        return f"token_id:{entry.token_id}" if self._as_ids else entry.text


class ChatLogprobs:
    """``choices[].logprobs`` of a chat."""

    def __init__(self, num_top: int, *, as_ids: bool) -> None:
        self._num_top = num_top
        self._spell = _Spelling(as_ids=as_ids)

    def body(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = []
        for entry in entries:
            described = self._entry(entry)
            described["top_logprobs"] = [self._entry(top) for top in entry.top[: self._num_top]]
            content.append(described)
        return {"content": content, "refusal": None}

    def _entry(self, entry: TokenLogprob | TopLogprob) -> dict[str, Any]:
        return {"token": self._spell(entry), "logprob": _value(entry.logprob), "bytes": list(entry.bytes)}


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion: parallel lists, with offsets into the text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._spell = _Spelling(as_ids=as_ids)

    def body(
        self, entries: Sequence[TokenLogprob | None], offset: int, prompt_ids: Sequence[int] = ()
    ) -> tuple[dict[str, Any], int]:
        """The lists and the offset after them.  ``None`` stands for a prompt's first token, which has no value."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for index, entry in enumerate(entries):
            offsets.append(offset)
            if entry is None:
                text = self._text(prompt_ids[index])
                tokens.append(f"token_id:{prompt_ids[index]}" if self._as_ids else text)
                values.append(None)
                tops.append(None)
                offset += len(text)
                continue
            tokens.append(self._spell(entry))
            values.append(_value(entry.logprob))
            tops.append(self._top(entry) if self._num_top else None)
            offset += len(entry.text)
        found = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
        return found, offset

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        found = {self._spell(top): _value(top.logprob) for top in entry.top[: self._num_top]}
        # The token that stands there is among them even if it is not one of the likeliest.
        found.setdefault(self._spell(entry), _value(entry.logprob))
        return found

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def prompt_logprobs_body(entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each position, by token id."""
    found: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            found.append(None)
            continue
        ranked = {
            str(top.token_id): {"logprob": _value(top.logprob), "rank": rank, "decoded_token": top.text}
            for rank, top in enumerate(entry.top, 1)
        }
        ranked[str(entry.token_id)] = {
            "logprob": _value(entry.logprob),
            "rank": entry.rank,
            "decoded_token": entry.text,
        }
        found.append(ranked)
    return found
