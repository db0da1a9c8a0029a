"""Steps without a device: the next token is a function of all tokens so far, and plans are checked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.contract import Limits
from isthmus.plan import Int32Array, RowStart, StepPlan, StepResult, TokenLogprobs
from isthmus.sampling_params import RowSampling
from isthmus.testing.toy_model import EOS_TOKEN, PRINTABLE, VOCAB_SIZE

UInt64Array = NDArray[np.uint64]

# A polynomial hash modulo 2**64: odd, so that it has an inverse, which makes the hash of every
# prefix of a prompt one cumulative sum.
_BASE: Final = 0x9E3779B97F4A7C15
_BASE_INVERSE: Final = pow(_BASE, -1, 2**64)


class PlanViolation(AssertionError):
    """A plan asked for something that a device could only do wrongly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NullBehaviour:
    """What the device that is not there takes, and how it fails.  A token of -1 never occurs."""

    step_s: float = 0.0
    """Seconds that a step takes."""
    token_s: float = 0.0
    """Seconds more for each token computed."""
    eos_every: int = 256
    """One token in so many is the end of the text; 0 for never."""
    nan_token: int = -1
    """A row whose prompt holds this token samples from logits with a NaN."""
    fail_token: int = -1
    """A step with a row whose prompt holds this token fails when it is collected."""
    fail_submit_token: int = -1
    """A step with a row whose prompt holds this token fails when it is submitted."""
    thorough: bool = False
    """Check the whole context of each span, not its end alone."""


@dataclass(slots=True)
class _Row:
    """What only the odd request needs; the rest is in arrays over all rows."""

    sampling: RowSampling
    num_prompt_tokens: int
    plain: bool


@dataclass(slots=True)
class _Done:
    result: StepResult
    due_s: float
    failure: str = ""


class NullExecutor:
    """Implements :class:`isthmus.contract.StepExecutor`.

    A step is computed when it is submitted, after all before it, as on a device with one queue;
    ``collect`` waits until the time that the step would have taken is over.
    """

    def __init__(
        self,
        limits: Limits,
        behaviour: NullBehaviour | None = None,
        *,
        max_steps_in_flight: int = 2,
        eos_token_id: int = EOS_TOKEN,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limits = limits
        self._behaviour = behaviour or NullBehaviour()
        self._max_steps_in_flight = max_steps_in_flight
        self._eos = eos_token_id
        self._sleep = sleep
        self._cache = _HashCache(limits)
        self._rows: list[_Row | None] = [None] * limits.max_rows
        self._plain = np.ones(limits.max_rows, np.bool_)
        self._invalid = np.zeros(limits.max_rows, np.bool_)
        self._fails = np.zeros(limits.max_rows, np.bool_)
        self._fails_submit = np.zeros(limits.max_rows, np.bool_)
        self._done: deque[_Done] = deque()
        self._busy_until_s = 0.0
        toy = limits.vocab_size >= VOCAB_SIZE
        self._first_token, self._num_tokens = PRINTABLE if toy else (0, limits.vocab_size)

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def max_steps_in_flight(self) -> int:
        return self._max_steps_in_flight

    def submit(self, plan: StepPlan) -> None:
        require(len(self._done) < self._max_steps_in_flight, "more steps are in flight than the executor allows")
        for start in plan.starts:
            self._start(start)
        self._cache.append_blocks(plan)
        rows = plan.span_rows
        if self._fails_submit[rows].any():
            raise RuntimeError("a failure that was asked for, while submitting")
        self._cache.compute(plan, thorough=self._behaviour.thorough)
        now = time.monotonic()
        took = self._behaviour.step_s + self._behaviour.token_s * plan.num_tokens
        self._busy_until_s = max(self._busy_until_s, now) + took
        failure = "a failure that was asked for, while computing" if self._fails[rows].any() else ""
        self._done.append(_Done(self._sample(plan), self._busy_until_s, failure))

    def collect(self) -> StepResult:
        done = self._done.popleft()
        wait_s = done.due_s - time.monotonic()
        if wait_s > 0 and (self._behaviour.step_s or self._behaviour.token_s):
            self._sleep(wait_s)
        if done.failure:
            raise RuntimeError(done.failure)
        return done.result

    def close(self) -> None:
        self._done.clear()

    def _start(self, start: RowStart) -> None:
        row, sampling, prompt = start.row, start.sampling, start.tokens[: start.num_prompt_tokens]
        require(0 <= row < self._limits.max_rows, f"row {row} started, of {self._limits.max_rows}")
        require(
            1 <= start.num_prompt_tokens <= len(start.tokens) <= self._limits.max_model_len,
            f"row {row} started with {len(start.tokens)} tokens, {start.num_prompt_tokens} of them the prompt",
        )
        self._cache.start(row, start.tokens)
        plain = (
            sampling.temperature == 0
            and sampling.min_tokens == 0
            and not sampling.allowed_token_ids
            and max(sampling.num_logprobs, sampling.num_prompt_logprobs) < 0
        )
        self._rows[row] = _Row(sampling, start.num_prompt_tokens, plain)
        self._plain[row] = plain
        self._invalid[row] = (prompt == self._behaviour.nan_token).any()
        self._fails[row] = (prompt == self._behaviour.fail_token).any()
        self._fails_submit[row] = (prompt == self._behaviour.fail_submit_token).any()

    def _sample(self, plan: StepPlan) -> StepResult:
        sampled = plan.span_samples
        rows = plan.span_rows[sampled]
        ends = (plan.span_starts + plan.span_lengths)[sampled]
        noise = mix(self._cache.hashes[rows, ends])
        tokens = self._tokens(noise)
        logprobs: TokenLogprobs | None = None
        prompt_logprobs: dict[int, TokenLogprobs] = {}
        if not self._plain[plan.span_rows].all():
            for place in np.flatnonzero(~self._plain[rows]):
                tokens[place] = self._choose(int(rows[place]), int(ends[place]), noise[place])
            logprobs = self._logprobs(rows, tokens, noise)
            prompt_logprobs = self._prompt_logprobs(plan)
        self._cache.write_tokens(rows, ends, tokens)
        return StepResult(
            step=plan.step,
            rows=rows,
            tokens=tokens.reshape(-1, 1),
            invalid=self._invalid[rows],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _tokens(self, noise: UInt64Array) -> Int32Array:
        tokens = ((noise >> np.uint64(8)) % np.uint64(self._num_tokens)).astype(np.int32) + np.int32(self._first_token)
        if self._behaviour.eos_every and self._eos < self._limits.vocab_size:
            tokens[noise % np.uint64(self._behaviour.eos_every) == 0] = self._eos
        return tokens

    def _choose(self, row: int, end: int, noise: np.uint64) -> int:
        """One token under the parameters that most requests leave alone."""
        state = self._rows[row]
        assert state is not None
        sampling = state.sampling
        if sampling.temperature > 0:
            noise = mix(np.array([noise ^ np.uint64(sampling.seed)]))[0]
        allowed = sampling.allowed_token_ids
        too_short = end - state.num_prompt_tokens < sampling.min_tokens
        while True:
            token = allowed[int(noise) % len(allowed)] if allowed else int(self._tokens(np.array([noise]))[0])
            if not (too_short and token in sampling.stop_token_ids):
                return token
            if allowed and set(allowed) <= set(sampling.stop_token_ids):
                return token
            noise = mix(np.array([noise]))[0]

    def _logprobs(self, rows: Int32Array, tokens: Int32Array, noise: UInt64Array) -> TokenLogprobs | None:
        counts = [-1 if state is None else state.sampling.num_logprobs for state in (self._rows[row] for row in rows)]
        most = max(counts, default=-1)
        return None if most < 0 else self._likely(tokens, noise, most)

    def _prompt_logprobs(self, plan: StepPlan) -> dict[int, TokenLogprobs]:
        found: dict[int, TokenLogprobs] = {}
        for row, start, length in zip(plan.span_rows, plan.span_starts, plan.span_lengths, strict=True):
            state = self._rows[row]
            assert state is not None
            stop = min(start + length + 1, state.num_prompt_tokens)
            if state.sampling.num_prompt_logprobs >= 0 and start + 1 < stop:
                tokens = self._cache.tokens[row, start + 1 : stop]
                noise = mix(self._cache.hashes[row, start + 1 : stop])
                found[int(row)] = self._likely(tokens, noise, state.sampling.num_prompt_logprobs)
        return found

    def _likely(self, tokens: Int32Array, noise: UInt64Array, count: int) -> TokenLogprobs:
        """Made-up log-probabilities in which the token that stands there is the likeliest."""
        chosen = -(noise % np.uint64(1000)).astype(np.float32) / np.float32(1000)
        steps = np.arange(count, dtype=np.int32)
        return TokenLogprobs(
            chosen=chosen,
            ranks=np.ones(len(tokens), np.int32),
            top_ids=((tokens[:, None] + steps) % self._limits.vocab_size).astype(np.int32),
            top_logprobs=(chosen[:, None] - steps).astype(np.float32),
        )


@dataclass(slots=True)
class _HashCache:
    """Token histories, block tables, and a "KV cache" whose slots hold a hash of the prefix."""

    limits: Limits
    tokens: Int32Array = field(init=False)  # [rows, max_model_len + 1]
    hashes: UInt64Array = field(init=False)  # [rows, max_model_len + 2] of the first n tokens, at n
    slots: UInt64Array = field(init=False)  # [num_blocks, block_size]
    tables: Int32Array = field(init=False)  # [rows, max_blocks_per_row] 0 where unset
    num_known: Int32Array = field(init=False)  # [rows]
    num_computed: Int32Array = field(init=False)  # [rows] -1 until the first span, -2 never started
    num_blocks: Int32Array = field(init=False)  # [rows]

    def __post_init__(self) -> None:
        limits = self.limits
        self.tokens = np.zeros((limits.max_rows, limits.max_model_len + 1), np.int32)
        self.hashes = np.zeros((limits.max_rows, limits.max_model_len + 2), np.uint64)
        self.slots = np.zeros((limits.num_blocks, limits.block_size), np.uint64)
        self.tables = np.zeros((limits.max_rows, limits.max_blocks_per_row), np.int32)
        self.num_known = np.zeros(limits.max_rows, np.int32)
        self.num_computed = np.full(limits.max_rows, -2, np.int32)
        self.num_blocks = np.zeros(limits.max_rows, np.int32)

    def start(self, row: int, tokens: Int32Array) -> None:
        count = len(tokens)
        self.tokens[row, :count] = tokens
        self.hashes[row, : count + 1] = prefix_hashes(tokens)
        self.tables[row] = 0
        self.num_known[row], self.num_computed[row], self.num_blocks[row] = count, -1, 0

    def append_blocks(self, plan: StepPlan) -> None:
        rows, places, blocks = plan.block_rows, plan.block_indices, plan.block_ids
        if not len(rows):
            return
        require(bool((self.num_computed[rows] != -2).all()), "a block is appended to a row that was never started")
        require(bool(((blocks >= 1) & (blocks < self.limits.num_blocks)).all()), "a block id is out of range")
        require(bool((places < self.limits.max_blocks_per_row).all()), "a block table grows over its end")
        # A block may be put in the place of another of the same content: the hashes tell if it is not.
        fresh = rows[self.tables[rows, places] == 0]
        self.tables[rows, places] = blocks
        require(bool((self.tables[rows, places] == blocks).all()), "a place in a block table is set twice in a step")
        self.num_blocks += np.bincount(fresh, minlength=len(self.num_blocks)).astype(np.int32)
        # No place was set twice in this step, so that as many as there are, all below their number, leave no hole.
        require(bool((places < self.num_blocks[rows]).all()), "a block table has a hole")

    def compute(self, plan: StepPlan, *, thorough: bool) -> None:
        rows, starts, lengths = plan.span_rows, plan.span_starts, plan.span_lengths
        ends = starts + lengths
        self._check_spans(plan, ends)
        size = self.limits.block_size
        later = np.flatnonzero(starts > 0)
        before, its_rows = starts[later] - 1, rows[later]
        held = self.slots[self.tables[its_rows, before // size], before % size]
        wrong = held != self.hashes[its_rows, starts[later]]
        require(not wrong.any(), f"the cache of rows {its_rows[wrong].tolist()} does not hold their prefix")
        if thorough:
            self._check_contexts(rows, starts)
        self.num_computed[rows] = ends
        one = lengths == 1
        places, one_rows = starts[one], rows[one]
        self.slots[self.tables[one_rows, places // size], places % size] = self.hashes[one_rows, places + 1]
        for span in np.flatnonzero(~one):
            row, positions = rows[span], np.arange(starts[span], ends[span])
            self.slots[self.tables[row, positions // size], positions % size] = self.hashes[row, positions + 1]

    def _check_spans(self, plan: StepPlan, ends: Int32Array) -> None:
        rows, starts, lengths = plan.span_rows, plan.span_starts, plan.span_lengths
        require(len(rows) > 0, "a step has no spans")
        require(int(np.bincount(rows).max()) == 1, "a row appears twice in a step")
        computed = self.num_computed[rows]
        require(bool((computed != -2).all()), "a span's row was never started")
        require(bool((lengths >= 1).all()), "a span is empty")
        require(plan.num_tokens <= self.limits.max_tokens, f"a step computes {plan.num_tokens} tokens")
        require(
            bool(((starts == computed) | (computed == -1)).all()),
            f"spans start at {starts.tolist()}; computed so far: {computed.tolist()}",
        )
        require(bool((ends <= self.num_known[rows]).all()), "a span reaches over the tokens known")
        require(bool((ends <= self.num_blocks[rows] * self.limits.block_size).all()), "a span reaches over its blocks")
        sampled = plan.span_samples
        require(len(sampled) == len(rows), "span_samples and span_rows differ in length")
        require(bool((ends == self.num_known[rows])[sampled].all()), "a span is sampled before the last token known")

    def _check_contexts(self, rows: Int32Array, starts: Int32Array) -> None:
        for row, start in zip(rows, starts, strict=True):
            table = self.tables[row, : self.num_blocks[row]]
            require(len(np.unique(table)) == len(table), f"the block table of row {row} holds a block twice")
            held = self.slots[table].reshape(-1)[:start]
            require(
                bool((held == self.hashes[row, 1 : start + 1]).all()),
                f"the cache of row {row} does not hold its {start} tokens",
            )

    def write_tokens(self, rows: Int32Array, ends: Int32Array, tokens: Int32Array) -> None:
        self.tokens[rows, ends] = tokens
        self.hashes[rows, ends + 1] = self.hashes[rows, ends] * np.uint64(_BASE) + (tokens + 1).astype(np.uint64)
        self.num_known[rows] = ends + 1


def require(holds: bool, what: str) -> None:
    if not holds:
        raise PlanViolation(what)


def prefix_hashes(tokens: Int32Array) -> UInt64Array:
    """The hash of the first ``n`` tokens, for each ``n`` from 0 on: ``h[n+1] = h[n] * base + token + 1``."""
    count = len(tokens)
    powers = np.full(count + 1, _BASE, np.uint64)
    inverse = np.full(count + 1, _BASE_INVERSE, np.uint64)
    powers[0] = inverse[0] = 1
    powers, inverse = np.cumprod(powers), np.cumprod(inverse)
    hashes = np.zeros(count + 1, np.uint64)
    hashes[1:] = powers[1:] * np.cumsum((tokens + 1).astype(np.uint64) * inverse[1:])
    return hashes


def mix(values: UInt64Array) -> UInt64Array:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = values ^ (values >> np.uint64(31))
    return mixed
