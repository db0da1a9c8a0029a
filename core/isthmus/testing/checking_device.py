"""A device in a hundred lines: runs plans in order, keeps what a real one would keep, and checks it.

Its "keys and values" for a token are the token, its position and a digest of all before it, so a
block that was overwritten, shared wrongly or never written is seen by the first span that reads it.
The "model" samples a token from that digest alone: whatever the scheduling, a request's output must
be what :func:`expected_tokens` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import numpy as np

from isthmus.engine.messages import AddRequest, unpack_tokens
from isthmus.plan import Int32Array, StepPlan, StepResult, TokenLogprobs

SEED_DIGEST = 14695981039346656037


def digest(before: int, token: int) -> int:
    return ((before ^ (token + 1)) * 1099511628211) % 2**64


def next_token(state: int, vocab_size: int) -> int:
    return (state >> 17) % vocab_size


def expected_tokens(request: AddRequest, max_model_len: int, vocab_size: int) -> list[int]:
    """What a request generates when it runs alone."""
    state, sampling = SEED_DIGEST, request.sampling
    prompt = unpack_tokens(request.prompt).tolist()
    for token in prompt:
        state = digest(state, token)
    tokens: list[int] = []
    while len(tokens) < sampling.max_tokens and len(prompt) + len(tokens) < max_model_len:
        token = next_token(state, vocab_size)
        tokens.append(token)
        if token in sampling.stop_token_ids and len(tokens) > sampling.min_tokens:
            break
        state = digest(state, token)
    return tokens


class CheckingDevice:
    """Executes a step when its result is collected, as late as a device may."""

    def __init__(
        self, *, rows: int, num_blocks: int, block_size: int, max_model_len: int, vocab_size: int = 50
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.kv: list[tuple[int, int, int] | None] = [None] * (num_blocks * block_size)
        self.tables = np.zeros((rows, -(-max_model_len // block_size)), np.int32)
        self.tokens = np.full((rows, max_model_len + 1), -1, np.int64)
        self.want_prompt_logprobs = np.zeros(rows, np.bool_)
        self.num_prompt_tokens = np.zeros(rows, np.int32)
        self.queue: deque[StepPlan] = deque()
        self.computed = 0
        self.void_step = -1

    def submit(self, plan: StepPlan) -> None:
        assert len(set(plan.span_rows.tolist())) == plan.num_spans, "a row has two spans"
        self.queue.append(plan)

    def drop(self) -> StepPlan:
        """The oldest step fails before it has done anything.

        Steps already submitted after it still run.  Whatever they write may be wrong, so it is made so.
        """
        plan = self.queue.popleft()
        self.void_step = plan.step + len(self.queue)
        return plan

    def collect(self, invalid_rows: Collection[int] = ()) -> StepResult:
        plan = self.queue.popleft()
        for start in plan.starts:
            assert start.row in plan.span_rows
            self.tables[start.row] = 0
            self.tokens[start.row] = -1
            self.tokens[start.row, : len(start.tokens)] = start.tokens
            self.num_prompt_tokens[start.row] = start.num_prompt_tokens
            self.want_prompt_logprobs[start.row] = start.sampling.num_prompt_logprobs >= 0
        assert 0 not in plan.block_ids, "the spare block was handed out"
        self.tables[plan.block_rows, plan.block_indices] = plan.block_ids
        spans = list(zip(plan.span_rows.tolist(), plan.span_starts.tolist(), plan.span_lengths.tolist(), strict=True))
        states = [self._spoil(*span) if plan.step <= self.void_step else self._compute(*span) for span in spans]
        pieces = {
            row: self._piece(start, length, row) for row, start, length in spans if self.want_prompt_logprobs[row]
        }
        rows, tokens = [], []
        for (row, start, length), state, sampled in zip(spans, states, plan.span_samples.tolist(), strict=True):
            if sampled:
                rows.append(row)
                tokens.append(next_token(state, self.vocab_size))
                self.tokens[row, start + length] = tokens[-1]
        self.computed += plan.num_tokens
        sampled_rows = np.array(rows, np.int32)
        return StepResult(
            step=plan.step,
            rows=sampled_rows,
            tokens=np.array(tokens, np.int32).reshape(-1, 1),
            invalid=np.isin(sampled_rows, list(invalid_rows)),
            logprobs=_logprobs(np.array(tokens, np.int32)),
            prompt_logprobs={row: piece for row, piece in pieces.items() if len(piece.chosen)},
        )

    def _slot(self, row: int, position: int) -> int:
        block = int(self.tables[row, position // self.block_size])
        return block * self.block_size + position % self.block_size

    def _compute(self, row: int, start: int, length: int) -> int:
        """Write the span's slots, then read the whole context back; the digest of it all."""
        state = SEED_DIGEST
        for position in range(start):
            state = digest(state, int(self.tokens[row, position]))
        blocks = self.tables[row, : (start + length - 1) // self.block_size + 1]
        assert blocks.all(), f"row {row} has {blocks.tolist()} for positions up to {start + length}"
        for position in range(start, start + length):
            token = int(self.tokens[row, position])
            assert token >= 0, f"row {row} computes position {position}, whose token nobody knows"
            self.kv[self._slot(row, position)] = (token, position, state)
            state = digest(state, token)
        state = SEED_DIGEST
        for position in range(start + length):
            token = int(self.tokens[row, position])
            seen = self.kv[self._slot(row, position)]
            assert seen == (token, position, state), f"row {row} reads {seen} at {position}, not {(token, state)}"
            state = digest(state, token)
        return state

    def _spoil(self, row: int, start: int, length: int) -> int:
        """What :meth:`_compute` does in a step that rests on one that failed."""
        for position in range(start, start + length):
            self.kv[self._slot(row, position)] = None
        return 0

    def _piece(self, start: int, length: int, row: int) -> TokenLogprobs:
        end = min(start + length + 1, int(self.num_prompt_tokens[row]))
        return _logprobs(self.tokens[row, start + 1 : end].astype(np.int32))


def _logprobs(tokens: Int32Array) -> TokenLogprobs:
    """Made up from the tokens themselves: -token / 8, rank token + 1, and two likeliest tokens."""
    top = np.stack([tokens, tokens + 1], axis=1)
    return TokenLogprobs(
        chosen=(-tokens / 8).astype(np.float32),
        ranks=tokens + 1,
        top_ids=top,
        top_logprobs=(-top / 8).astype(np.float32),
    )
