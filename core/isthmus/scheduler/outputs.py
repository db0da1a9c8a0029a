"""From a step's arrays to the messages that clients get."""

from __future__ import annotations

import numpy as np

from isthmus.engine.messages import FinishReason, Logprobs, TokensOut
from isthmus.plan import StepPlan, TokenLogprobs
from isthmus.scheduler.sequence import Sequence

PromptPiece = tuple[Logprobs | None, ...]


def token_logprobs(found: TokenLogprobs, index: int, token: int, num_top: int) -> Logprobs:
    """Entry ``index``, cut to the ``num_top`` likeliest tokens that its request asked for."""
    ids, values = found.top_ids[index, :num_top].tolist(), found.top_logprobs[index, :num_top].tolist()
    return Logprobs(token, float(found.chosen[index]), int(found.ranks[index]), tuple(zip(ids, values, strict=True)))


def prompt_piece(sequence: Sequence, span_start: int, found: TokenLogprobs) -> PromptPiece:
    """What a span adds to the prompt's log-probabilities; positions sent before a preemption are left out."""
    sent = sequence.num_prompt_logprobs_sent
    piece: list[Logprobs | None] = [] if sent else [None]
    begin, end = max(span_start + 1, sent), min(span_start + 1 + len(found.chosen), sequence.num_prompt_tokens)
    if begin >= end:
        return ()
    assert begin == sent + len(piece), f"prompt log-probabilities skip from position {sent} to {begin}"
    num_top = sequence.request.sampling.num_prompt_logprobs
    for position in range(begin, end):
        token = int(sequence.tokens[position])
        piece.append(token_logprobs(found, position - span_start - 1, token, num_top))
    sequence.num_prompt_logprobs_sent = sent + len(piece)
    return tuple(piece)


def full_output(
    sequence: Sequence,
    token: int,
    *,
    finish_reason: FinishReason | None = None,
    logprobs: tuple[Logprobs, ...] = (),
    piece: PromptPiece = (),
) -> TokensOut:
    """One token and all that may come with it."""
    if sequence.wants_prompt_logprobs and sequence.num_prompt_logprobs_sent == 0:
        piece = (None,)  # a prompt of one token has no next token to speak of
        sequence.num_prompt_logprobs_sent = 1
    cached, queued_s = announcement(sequence)
    return TokensOut(
        sequence.request_id,
        (token,),
        finish_reason,
        token if finish_reason is FinishReason.STOP else None,
        logprobs,
        piece,
        num_cached_tokens=cached,
        queued_s=queued_s,
    )


def piece_output(sequence: Sequence, piece: PromptPiece) -> TokensOut:
    """Prompt log-probabilities of a step that sampled no token."""
    cached, queued_s = announcement(sequence)
    return TokensOut(sequence.request_id, prompt_logprobs=piece, num_cached_tokens=cached, queued_s=queued_s)


def error_output(sequence: Sequence, message: str) -> TokensOut:
    return TokensOut(sequence.request_id, finish_reason=FinishReason.ERROR, error=message)


def announcement(sequence: Sequence) -> tuple[int, float]:
    """Cached tokens and time in the queue, which go out once, with the first output."""
    if sequence.announced:
        return -1, 0.0
    sequence.announced = True
    return sequence.num_cached_tokens, sequence.queued_s


def span_of(plan: StepPlan, row: int) -> int:
    """The number of the one span of ``row``."""
    return int(np.flatnonzero(plan.span_rows == row)[0])
