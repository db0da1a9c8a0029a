"""From the engine's tokens to one choice's text: shared by the offline engine and the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from isthmus.engine.messages import FinishReason, Logprobs, TokensOut
from isthmus.sampling_params import SamplingParams
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.stop import StopStrings

if TYPE_CHECKING:
    from isthmus.text.tokenizer import Tokenizer


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One of the likeliest tokens of a position."""

    token_id: int
    text: str
    """The token by itself; U+FFFD where it is part of a character."""
    bytes: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """The token that stands at a position, and the likeliest ones there, best first."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    rank: int
    """1 is the likeliest."""
    top: tuple[TopLogprob, ...] = ()


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What one message from the engine adds to a choice."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token of ``token_ids``, if asked for."""
    finish_reason: str | None = None
    """``stop``, ``length``, ``abort`` or ``error``; the choice is complete then."""
    stop_reason: int | str | None = None
    """The stop string met, or the id in ``stop_token_ids``; ``None`` for an end-of-sequence token."""
    stopped_by_text: bool = False
    """A stop string ended it, which the engine does not know: abort the request there."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    error: str = ""


class ChoiceStream:
    """One choice of a request as it grows.

    Every token is looked at by itself, so the deltas joined do not depend on how many tokens
    came in one message.  With no tokenizer there are ids and no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = (
            None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        )
        self._stop = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._finished = False
        self.num_tokens = 0
        self.cumulative_logprob = 0.0

    @property
    def finished(self) -> bool:
        return self._finished

    def push(self, out: TokensOut) -> Delta:
        """Take over what a step brought.  After the end, everything is ignored."""
        if self._finished:
            return Delta()
        hidden_end = out.stop_token is not None and not self._params.include_stop_str_in_output
        pieces: list[str] = []
        used = 0
        for token_id in out.tokens:
            used += 1
            self.num_tokens += 1
            if self._detokenizer is None or (hidden_end and used == len(out.tokens)):
                continue
            pieces.append(self._watch(self._detokenizer.push((token_id,))))
            if self._stop.found is not None:
                break
        logprobs = tuple([self._describe(entry) for entry in out.logprobs[:used]]) if out.logprobs else ()
        for entry in logprobs:
            self.cumulative_logprob += entry.logprob
        reason, stop_reason = self._ending(out)
        if reason is not None:
            self._finished = True
            pieces.append(self._rest())
            if self._stop.found is not None:  # the last characters may have completed one
                reason, stop_reason = FinishReason.STOP, self._stop.found
        return Delta(
            text="".join(pieces),
            token_ids=out.tokens if used == len(out.tokens) else out.tokens[:used],
            logprobs=logprobs,
            finish_reason=None if reason is None else str(reason),
            stop_reason=stop_reason,
            stopped_by_text=self._stop.found is not None and out.finish_reason is None,
            prompt_logprobs=tuple([None if entry is None else self._describe(entry) for entry in out.prompt_logprobs]),
            error=out.error,
        )

    def finish(self, finish_reason: FinishReason = FinishReason.ABORT) -> Delta:
        """End a choice that the engine will say no more about, showing what was kept back."""
        return self.push(TokensOut(request_id=0, finish_reason=finish_reason))

    def _ending(self, out: TokensOut) -> tuple[FinishReason | None, int | str | None]:
        if self._stop.found is not None:
            return FinishReason.STOP, self._stop.found
        listed = out.stop_token is not None and out.stop_token in self._params.stop_token_ids
        return out.finish_reason, out.stop_token if listed else None

    def _watch(self, text: str) -> str:
        """Stop strings count only in what comes after ``min_tokens`` tokens."""
        return text if self.num_tokens <= self._min_tokens else self._stop.push(text)

    def _rest(self) -> str:
        if self._detokenizer is None or self._stop.found is not None:
            return ""
        return self._watch(self._detokenizer.finish()) + self._stop.finish()

    def _describe(self, entry: Logprobs) -> TokenLogprob:
        text, raw = self._spell(entry.token)
        top = []
        for token_id, logprob in entry.top:
            top_text, top_raw = self._spell(token_id)
            top.append(TopLogprob(token_id=token_id, text=top_text, bytes=top_raw, logprob=logprob))
        return TokenLogprob(
            token_id=entry.token, text=text, bytes=raw, logprob=entry.logprob, rank=entry.rank, top=tuple(top)
        )

    def _spell(self, token_id: int) -> tuple[str, bytes]:
        if self._tokenizer is None:
            return "", b""
        raw = self._tokenizer.token_bytes(token_id)
        return raw.decode("utf-8", "replace"), raw
