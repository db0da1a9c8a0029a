"""Which spans run next.

A step is planned before the results of the steps before it are in.  Planning moves the scheduler's
view ahead as if the step had run: its tokens count as computed, and a span that ends at a row's last
token adds a *placeholder*, a token whose id only the device knows.  Results arrive in the order of
the plans and turn placeholders into tokens.  What arrives for a stay in a row that is over goes to
the sequence that stayed there then (preempted), or nowhere (ended), never to the row's next owner.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count

import numpy as np
from numpy.typing import NDArray

from isthmus.cache import BlockManager
from isthmus.engine.messages import AddRequest, FinishReason, Logprobs, TokensOut, unpack_tokens
from isthmus.errors import InvalidRequest, QueueFull
from isthmus.plan import Int32Array, RowStart, StepPlan, StepResult
from isthmus.scheduler.admission import Admission
from isthmus.scheduler.draft import Draft, Flight
from isthmus.scheduler.forecast import OutputForecast
from isthmus.scheduler.limits import SchedulerLimits
from isthmus.scheduler.outputs import (
    PromptPiece,
    error_output,
    full_output,
    piece_output,
    prompt_piece,
    span_of,
    token_logprobs,
)
from isthmus.scheduler.rows import Rows
from isthmus.scheduler.sequence import Sequence, SequenceQueue
from isthmus.scheduler.spans import span_policy
from isthmus.scheduler.stats import SchedulerStats

MAX_LOOKAHEAD = 256
"""Waiting requests looked at in one step."""
MAX_UNFIT = 16
"""Of these, how many may turn out not to fit before the rest is left for later: each costs a forecast."""
RETRY_STEPS = 16
"""Steps after which requests that did not fit are looked at again though nothing has ended since."""
CHAIN_BROKEN = np.iinfo(np.int32).max


class Scheduler:
    """Plans steps over running and waiting requests.  Not thread-safe; never waits."""

    def __init__(
        self, limits: SchedulerLimits, blocks: BlockManager, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._clock = clock
        blocks.open_rows(limits.max_num_seqs, limits.max_model_len)
        self._rows = Rows(limits.max_num_seqs, limits.max_model_len)
        self._free_rows = list(reversed(range(limits.max_num_seqs)))
        self._requests: dict[int, Sequence] = {}
        self._running = SequenceQueue()
        self._waiting = SequenceQueue()
        self._order: Int32Array | None = None
        self._spans = span_policy(limits.span_mix, limits.max_long_spans, limits.max_num_seqs)
        self._forecast = OutputForecast()
        self._flights: deque[Flight] = deque()
        self._step = 0
        self._retry_step = 0
        self._arrivals = count()
        self._serials = count()
        self._step_tokens: deque[int] = deque(maxlen=256)
        self._prompt_tokens = self._computed_tokens = self._generation_tokens = 0
        self._prefix_queries = self._prefix_hits = self._preemptions = self._invalid_rows = 0

    # Requests come and go

    def add(self, request: AddRequest) -> None:
        """Queue a request.  Raises :class:`InvalidRequest` if it can never run, :class:`QueueFull`."""
        prompt, sampling = unpack_tokens(request.prompt), request.sampling
        self._require_possible(request, len(prompt))
        # Rows still free are no queue: the next plan fills them.
        if len(self._waiting) >= self._limits.max_waiting + len(self._free_rows):
            raise QueueFull(f"{len(self._waiting)} requests are waiting, as many as may; try again later")
        sequence = Sequence(
            request=request,
            arrival=next(self._arrivals),
            queued_at_s=request.arrival_s or self._clock(),
            tokens=prompt,
            num_prompt_tokens=len(prompt),
            max_length=min(len(prompt) + sampling.max_tokens, self._limits.max_model_len),
        )
        if self._blocks.prefix_caching:
            self._blocks.cache.extend_keys(sequence.keys, prompt, request.cache_salt)
        self._requests[request.request_id] = sequence
        self._waiting.add(sequence)
        self._retry_step = 0

    def _require_possible(self, request: AddRequest, num_prompt_tokens: int) -> None:
        longest, limit = self._limits.max_model_len, request.sampling.max_tokens
        if num_prompt_tokens == 0:
            raise InvalidRequest("the prompt holds no tokens; give it at least one", param="prompt")
        if num_prompt_tokens >= longest:
            raise InvalidRequest(
                f"the prompt has {num_prompt_tokens} tokens; with one to generate, this model takes at most "
                f"{longest}; shorten the prompt",
                param="prompt",
            )
        if limit < 1:
            raise InvalidRequest(f"max_tokens is {limit}; it must be at least 1", param="max_tokens")
        needed = self._blocks.blocks_for(min(num_prompt_tokens + limit, longest) - 1)
        if needed > self._blocks.num_usable:
            raise InvalidRequest(
                f"{num_prompt_tokens} prompt tokens and {limit} more need {needed} KV blocks of "
                f"{self._blocks.block_size} tokens; there are {self._blocks.num_usable}; "
                "shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use", param="request_id")

    def abort(self, request_ids: Iterable[int]) -> list[int]:
        """Forget these requests at once, and whatever steps in flight bring for them; the ids that were live."""
        live = [self._requests[i] for i in dict.fromkeys(request_ids) if i in self._requests]
        for sequence in live:
            self._finish(sequence)
        return [sequence.request_id for sequence in live]

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs, or has a result outstanding."""
        return bool(self._requests or self._flights)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # Planning

    def plan(self) -> StepPlan | None:
        """The next step, or ``None`` if nothing can run before more results or requests come in."""
        if len(self._flights) >= self._limits.steps_in_flight:
            return None
        draft = self._draft()
        if not draft.rows and self._spans.retry():
            draft = self._draft()
        if not draft.rows:
            return None
        self._spans.planned()
        return self._launch(draft)

    def _draft(self) -> Draft:
        draft = Draft(self._limits.max_num_batched_tokens)
        self._continue_running(draft)
        could_start = self._waiting and self._free_rows and draft.budget and not draft.preempted
        if could_start and (self._step >= self._retry_step or not self._running):
            self._start_waiting(draft)
        return draft

    def _continue_running(self, draft: Draft) -> None:
        while True:
            order = self._running_rows()
            lengths = self._spans.share(self._rows.needed(order), draft.budget, bool(self._waiting))
            chosen = np.flatnonzero(lengths)
            rows, lengths = order[chosen], lengths[chosen]
            if not len(rows):
                return
            missing = self._blocks.missing(rows, self._rows.computed[rows] + lengths)
            if missing.sum() <= self._blocks.num_available:
                draft.add(rows, lengths, self._blocks.grow(rows, missing))
                return
            # The first in order is never preempted for want of blocks: alone, any request fits.  So it advances.
            self._preempt(self._running.last)
            draft.preempted = True

    def _start_waiting(self, draft: Draft) -> None:
        admission = Admission(self._running_rows(), self._rows, self._blocks, self._forecast)
        size, limits = self._blocks.block_size, self._limits
        unfit: list[Sequence] = []
        only_blocks_lacked = True
        for sequence in self._waiting.first(MAX_LOOKAHEAD):
            if not self._free_rows or not draft.budget or len(unfit) >= MAX_UNFIT:
                break
            if any(other.overtaken >= limits.max_overtakes for other in unfit):
                break
            cached = admission.cached_blocks(sequence)
            if sequence.deferrals < limits.max_deferrals and admission.is_in_progress(sequence, cached):
                sequence.deferrals += 1
                only_blocks_lacked = False
                continue
            length = self._spans.offer(len(sequence.tokens) - cached * size, draft.budget)
            if sequence.num_pending or not length:
                only_blocks_lacked = False
                unfit.append(sequence)
            elif admission.fits(sequence, cached, length):
                admission.start(sequence, cached)
                self._start(sequence, cached, length, draft)
                for other in unfit:
                    other.overtaken += 1
            else:
                unfit.append(sequence)
        if unfit and only_blocks_lacked and not draft.starts:
            self._retry_step = self._step + RETRY_STEPS

    def _start(self, sequence: Sequence, num_cached_blocks: int, length: int, draft: Draft) -> None:
        row, cached = self._free_rows.pop(), num_cached_blocks * self._blocks.block_size
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = cached
            sequence.queued_s = max(0.0, self._clock() - sequence.queued_at_s)
            self._prompt_tokens += sequence.num_prompt_tokens
            self._prefix_queries += sequence.num_prompt_tokens
            self._prefix_hits += cached
        self._waiting.remove(sequence)
        self._running.add(sequence)
        self._order = None
        sequence.row = row
        self._rows.start(row, sequence, next(self._serials), cached)
        self._rows.shared_blocks[row] = num_cached_blocks
        draft.edits.append(self._blocks.adopt(row, sequence.keys[:num_cached_blocks]))
        rows, lengths = np.array([row], np.int32), np.array([length], np.int32)
        draft.add(rows, lengths, self._blocks.grow(rows, self._blocks.missing(rows, cached + lengths)))
        draft.starts.append(
            RowStart(
                row=row,
                tokens=sequence.tokens,
                num_prompt_tokens=sequence.num_prompt_tokens,
                sampling=sequence.request.sampling,
            )
        )
        self._spans.started(length)

    def _launch(self, draft: Draft) -> StepPlan:
        (rows, lengths), edits, state = draft.joined_spans(), draft.joined_edits(), self._rows
        starts = state.computed[rows]
        ends = starts + lengths
        samples = ends == state.lengths[rows]
        plan = StepPlan(
            step=self._step,
            starts=tuple(draft.starts),
            block_rows=edits.rows,
            block_indices=edits.indices,
            block_ids=edits.ids,
            span_rows=rows,
            span_starts=starts,
            span_lengths=lengths,
            span_samples=samples,
        )
        state.computed[rows] = ends
        state.lengths[rows] += samples
        sampled = rows[samples]
        self._flights.append(Flight(plan, state.sequences[rows], sampled, state.serials[sampled]))
        self._step += 1
        num_tokens = self._limits.max_num_batched_tokens - draft.budget
        self._step_tokens.append(num_tokens)
        self._computed_tokens += num_tokens
        if self._blocks.prefix_caching:
            size = self._blocks.block_size
            full = np.minimum(ends, state.known[rows]) // size
            ready = full > state.shared_blocks[rows]
            for row, num_full in zip(rows[ready].tolist(), full[ready].tolist(), strict=True):
                self._share(row, num_full)
        return plan

    # Results

    def update(self, result: StepResult) -> list[TokensOut]:
        """What the oldest step in flight brought, one message a request; frees what has ended."""
        flight, rows = self._flights.popleft(), self._rows
        assert result.step == flight.plan.step, f"result of step {result.step}, of {flight.plan.step} expected"
        assert np.array_equal(result.rows, flight.rows), f"step {result.step} sampled other rows than planned"
        pieces = self._prompt_pieces(flight, result)
        current = rows.serials[flight.rows] == flight.serials
        picked = np.flatnonzero(current & ~result.invalid)
        kept = flight.rows[picked]
        tokens = result.tokens[picked, 0]
        stopped, full = rows.append(kept, tokens)
        ids = rows.request_ids[kept].tolist()
        outputs = [TokensOut(i, (token,)) for i, token in zip(ids, tokens.tolist(), strict=True)]
        self._generation_tokens += len(outputs)
        special = stopped | full | rows.detailed[kept]
        if pieces:
            special |= np.isin(rows.request_ids[kept], list(pieces))
        for i in np.flatnonzero(special).tolist():
            sequence: Sequence = rows.sequences[kept[i]]
            reason = FinishReason.STOP if stopped[i] else FinishReason.LENGTH if full[i] else None
            piece = pieces.pop(sequence.request_id, ())
            outputs[i] = self._full_output(sequence, int(picked[i]), result, reason, piece)
        if len(picked) < len(flight.rows):
            self._settle_rest(flight, result, current, pieces, outputs)
        outputs.extend(piece_output(self._requests[i], piece) for i, piece in pieces.items())
        return outputs

    def _full_output(
        self, sequence: Sequence, sample: int, result: StepResult, reason: FinishReason | None, piece: PromptPiece
    ) -> TokensOut:
        token, num_logprobs = int(result.tokens[sample, 0]), sequence.request.sampling.num_logprobs
        logprobs: tuple[Logprobs, ...] = ()
        if num_logprobs >= 0 and result.logprobs is not None:
            logprobs = (token_logprobs(result.logprobs, sample, token, num_logprobs),)
        if sequence.row is not None:
            self._rows.detailed[sequence.row] = num_logprobs >= 0
        output = full_output(sequence, token, finish_reason=reason, logprobs=logprobs, piece=piece)
        if reason is not None:
            self._end(sequence)
        return output

    def _end(self, sequence: Sequence) -> None:
        """It ends by itself: by a stop token or at its full length."""
        length = len(sequence.tokens) if sequence.row is None else int(self._rows.known[sequence.row])
        self._forecast.record(length - sequence.num_prompt_tokens)
        self._finish(sequence)

    def _settle_rest(
        self,
        flight: Flight,
        result: StepResult,
        current: NDArray[np.bool_],
        pieces: dict[int, PromptPiece],
        outputs: list[TokensOut],
    ) -> None:
        """Samples that are not the next token of the row that they were planned for: bad, late or void."""
        owners = flight.owners[flight.plan.span_samples]
        for i in np.flatnonzero(~current | result.invalid).tolist():
            sequence: Sequence = owners[i]
            if sequence.finished or flight.plan.step <= sequence.void_step:
                continue
            piece = pieces.pop(sequence.request_id, ())
            if result.invalid[i]:
                self._invalid_rows += 1
                outputs.append(self._fail(sequence, "the model's logits were not finite, so no token could be sampled"))
            else:
                outputs.append(self._late_token(sequence, i, result, piece))

    def _late_token(self, sequence: Sequence, sample: int, result: StepResult, piece: PromptPiece) -> TokensOut:
        """A token of a sequence that was preempted while the step that samples it was in flight."""
        assert sequence.row is None and sequence.num_pending > 0
        token = int(result.tokens[sample, 0])
        sequence.num_pending -= 1
        sequence.tokens = np.append(sequence.tokens, np.int32(token))
        self._generation_tokens += 1
        length = len(sequence.tokens)
        stopped, full = sequence.is_stop(token, length), length >= sequence.max_length
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH if full else None
        return self._full_output(sequence, sample, result, reason, piece)

    def _prompt_pieces(self, flight: Flight, result: StepResult) -> dict[int, PromptPiece]:
        """Prompt log-probabilities that go out with this step, by request id."""
        pieces = {}
        for row, found in result.prompt_logprobs.items():
            span = span_of(flight.plan, row)
            sequence: Sequence = flight.owners[span]
            if sequence.finished or flight.plan.step <= sequence.void_step or not sequence.wants_prompt_logprobs:
                continue
            if piece := prompt_piece(sequence, int(flight.plan.span_starts[span]), found):
                pieces[sequence.request_id] = piece
        return pieces

    def fail_step(self, step: int, message: str) -> list[TokensOut]:
        """The device failed the oldest step in flight: its requests end with an error.

        Requests that took no part in it stay, but what later steps in flight do for them may rest on
        what this one should have written: it is void, and they begin again from the tokens known.
        """
        flight = self._flights.popleft()
        assert step == flight.plan.step, f"step {step} failed, but {flight.plan.step} is the oldest in flight"
        outputs = [self._fail(sequence, message) for sequence in flight.owners if not sequence.finished]
        for sequence in list(self._running):
            self._preempt(sequence)
        for sequence in self._waiting:
            sequence.void_step = self._step - 1
            sequence.num_pending = 0
        self._blocks.cache.forget_since(step)
        return outputs

    def _fail(self, sequence: Sequence, message: str) -> TokensOut:
        """End it with an error; nothing that it computed itself stays in the prefix cache."""
        row = sequence.row
        if row is not None:
            first = int(self._rows.cached[row]) // self._blocks.block_size
            self._blocks.cache.forget(self._blocks.tables[row, first : self._blocks.counts[row]].copy())
            self._rows.shared_blocks[row] = CHAIN_BROKEN
        self._finish(sequence)
        return error_output(sequence, message)

    # Rows

    def _running_rows(self) -> Int32Array:
        if self._order is None:
            self._order = np.array([sequence.row for sequence in self._running], np.int32)
        return self._order

    def _share(self, row: int, num_full: int) -> None:
        """Offer a row's ``num_full`` blocks of computed, known tokens to the prefix cache."""
        state, begin = self._rows, int(self._rows.shared_blocks[row])
        if num_full <= begin:
            return
        sequence: Sequence = state.sequences[row]
        tokens = state.tokens[row, : num_full * self._blocks.block_size]
        self._blocks.cache.extend_keys(sequence.keys, tokens, sequence.request.cache_salt)
        intact = self._blocks.share(row, sequence.keys, begin, num_full, self._step - 1)
        state.shared_blocks[row] = num_full if intact else CHAIN_BROKEN

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with the tokens known; it will be computed again, but for what stays cached."""
        row = sequence.row
        assert row is not None
        known = int(self._rows.known[row])
        sequence.tokens = self._rows.tokens[row, :known].copy()
        sequence.num_pending = int(self._rows.lengths[row]) - known
        self._vacate(sequence)
        self._waiting.add(sequence)
        self._preemptions += 1

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._requests[sequence.request_id]
        if sequence.row is None:
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        # Steps in flight may still write this row and its blocks.  Both may be given away at once: a
        # step planned later runs later, and begins by making the row its own.
        row = sequence.row
        assert row is not None
        if self._blocks.prefix_caching:
            self._share(row, int(min(self._rows.computed[row], self._rows.known[row])) // self._blocks.block_size)
        self._blocks.release(row)
        self._rows.clear(row)
        self._free_rows.append(row)
        self._running.remove(sequence)
        self._order = None
        self._retry_step = 0
        sequence.row = None

    def stats(self) -> SchedulerStats:
        """Counters so far; ``step_tokens`` is emptied by asking."""
        blocks, running = self._blocks, self._running_rows()
        slots = blocks.num_used * blocks.block_size
        empty = int((blocks.counts[running] * blocks.block_size - self._rows.computed[running]).sum())
        step_tokens = tuple(self._step_tokens)
        self._step_tokens.clear()
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=blocks.num_usable,
            num_free_blocks=blocks.pool.num_free,
            num_cached_blocks=blocks.cache.num_idle,
            block_size=blocks.block_size,
            kv_waste=empty / slots if slots else 0.0,
            steps=self._step,
            prompt_tokens=self._prompt_tokens,
            computed_tokens=self._computed_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            invalid_rows=self._invalid_rows,
            step_tokens=step_tokens,
        )
