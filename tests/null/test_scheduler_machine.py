"""Random lives of a scheduler: whatever comes, every request gets what it would get alone."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from isthmus.cache import BlockManager
from isthmus.contract import SpanMix
from isthmus.engine.messages import AddRequest, FinishReason, TokensOut, pack_tokens
from isthmus.errors import InvalidRequest, QueueFull
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits
from isthmus.testing.checking_device import CheckingDevice, expected_tokens

VOCAB = 12


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 64),
        block_size=st.sampled_from([1, 2, 4]),
        rows=st.integers(1, 6),
        budget=st.integers(1, 24),
        depth=st.integers(1, 3),
        mix=st.sampled_from(SpanMix),
        max_long=st.integers(0, 3),
        prefix_caching=st.booleans(),
        max_model_len=st.integers(8, 80),
        max_overtakes=st.integers(0, 3),
        max_deferrals=st.integers(0, 3),
    )
    def build(
        self,
        num_blocks,
        block_size,
        rows,
        budget,
        depth,
        mix,
        max_long,
        prefix_caching,
        max_model_len,
        max_overtakes,
        max_deferrals,
    ):
        self.limits = SchedulerLimits(
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            max_waiting=12,
            max_overtakes=max_overtakes,
            max_deferrals=max_deferrals,
            steps_in_flight=depth,
            span_mix=mix,
            max_long_spans=max_long,
        )
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching, seed=b"test")
        self.scheduler = Scheduler(self.limits, self.blocks)
        self.device = CheckingDevice(
            rows=rows, num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len, vocab_size=VOCAB
        )
        self.requests: dict[int, AddRequest] = {}
        self.tokens: dict[int, list[int]] = {}
        self.pieces: dict[int, list] = {}
        self.live: set[int] = set()

    @rule(
        prefix=st.integers(0, 30),
        tail=st.lists(st.integers(0, 1), max_size=4),
        max_tokens=st.integers(1, 30),
        min_tokens=st.integers(0, 3),
        stops=st.sampled_from([(), (3,), (1, 5, 7)]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([b"", b"tenant"]),
        num_logprobs=st.sampled_from([-1, -1, 0, 1]),
        num_prompt_logprobs=st.sampled_from([-1, -1, -1, 1]),
    )
    def add(self, prefix, tail, max_tokens, min_tokens, stops, priority, salt, num_logprobs, num_prompt_logprobs):
        prompt = [(i * i) % 5 for i in range(prefix)] + tail
        request = AddRequest(
            len(self.requests),
            pack_tokens(prompt),
            RowSampling(
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                stop_token_ids=stops,
                num_logprobs=num_logprobs,
                num_prompt_logprobs=num_prompt_logprobs,
            ),
            priority=priority,
            cache_salt=salt,
        )
        try:
            self.scheduler.add(request)
        except QueueFull:
            free_rows = self.limits.max_num_seqs - self.scheduler.num_running
            assert self.scheduler.num_waiting == self.limits.max_waiting + free_rows
        except InvalidRequest:
            length = min(len(prompt) + max_tokens, self.limits.max_model_len)
            fits = self.blocks.blocks_for(length - 1) < self.blocks.pool.num_blocks
            assert not prompt or len(prompt) >= self.limits.max_model_len or not fits
        else:
            self.requests[request.request_id] = request
            self.tokens[request.request_id] = []
            self.pieces[request.request_id] = []
            self.live.add(request.request_id)

    @rule(data=st.data())
    def abort(self, data):
        ids = data.draw(st.lists(st.integers(0, len(self.requests)), max_size=2))
        assert set(self.scheduler.abort(ids)) == self.live & set(ids)
        self.live -= set(ids)

    @rule(count=st.integers(1, 4))
    def plan(self, count):
        for _ in range(count):
            idle = self.scheduler.num_running == 0 and not self.device.queue
            plan = self.scheduler.plan()
            if plan is None:
                assert not (idle and self.scheduler.num_waiting), "nothing runs, something waits, and nothing happens"
                return
            self._check_plan(plan)
            self.device.submit(plan)

    def _check_plan(self, plan):
        assert 0 < plan.num_tokens <= self.limits.max_num_batched_tokens
        assert (plan.span_lengths >= 1).all()
        if self.limits.span_mix is SpanMix.SINGLES_APART:
            lengths = plan.span_lengths
            assert lengths.max() == 1 or (lengths.min() > 1 and len(lengths) <= (self.limits.max_long_spans or 99))

    @rule(count=st.integers(1, 4))
    def collect(self, count):
        for _ in range(min(count, len(self.device.queue))):
            self._receive(self.scheduler.update(self.device.collect()))

    @rule(data=st.data())
    def collect_bad_row(self, data):
        if self.device.queue and (plan := self.device.queue[0]).span_samples.any():
            row = data.draw(st.sampled_from(plan.span_rows[plan.span_samples].tolist()))
            self._receive(self.scheduler.update(self.device.collect(invalid_rows=[row])), may_fail=1)

    @rule()
    def fail_step(self):
        if self.device.queue:
            plan = self.device.drop()
            outputs = self.scheduler.fail_step(plan.step, "out of memory")
            assert all(output.error == "out of memory" for output in outputs)
            self._receive(outputs, may_fail=plan.num_spans)

    def _receive(self, outputs: list[TokensOut], may_fail: int = 0):
        assert len({output.request_id for output in outputs}) == len(outputs)
        errors = sum(output.finish_reason is FinishReason.ERROR for output in outputs)
        assert errors <= may_fail
        for output in outputs:
            number = output.request_id
            assert number in self.live
            first = not self.tokens[number] and not self.pieces[number]
            request = self.requests[number]
            self.tokens[number] += output.tokens
            self.pieces[number] += output.prompt_logprobs
            wanted = expected_tokens(request, self.limits.max_model_len, VOCAB)
            got = self.tokens[number]
            assert got == wanted[: len(got)]
            if output.finish_reason is FinishReason.ERROR:
                assert output.error
                self.live.remove(number)
                continue
            assert (output.num_cached_tokens >= 0) == first
            if request.sampling.num_logprobs >= 0:
                assert [entry.token for entry in output.logprobs] == list(output.tokens)
                assert all(len(entry.top) == request.sampling.num_logprobs for entry in output.logprobs)
            else:
                assert not output.logprobs
            if got:
                self._check_prompt_logprobs(request)
            assert (output.finish_reason is not None) == (len(got) == len(wanted))
            if output.finish_reason is FinishReason.STOP:
                assert output.stop_token == got[-1]
            if output.finish_reason is not None:
                self.live.remove(number)

    def _check_prompt_logprobs(self, request):
        pieces = self.pieces[request.request_id]
        if request.sampling.num_prompt_logprobs < 0:
            assert not pieces
            return
        prompt = np.frombuffer(request.prompt, "<i4").tolist()
        assert pieces[0] is None
        assert [piece.token for piece in pieces[1:]] == prompt[1:]
        assert all(piece.rank == piece.token + 1 for piece in pieces[1:])

    @invariant()
    def blocks_add_up(self):
        pool, cache = self.blocks.pool, self.blocks.cache
        holders = np.zeros(pool.num_blocks, int)
        for row, count in enumerate(self.blocks.counts.tolist()):
            held = self.blocks.tables[row, :count]
            assert len(set(held.tolist())) == count and 0 not in held
            assert not self.blocks.tables[row, count:].any()
            holders[held] += 1
        assert (holders == pool.refs).all()
        cached = cache.is_cached(np.arange(pool.num_blocks))
        assert cached.sum() == len(cache)
        assert not cached[holders > 1].size or cached[holders > 1].all(), "a block outside the cache has two owners"
        free = set(pool.free_ids.tolist())
        assert len(free) == pool.num_free
        assert not free & set(np.flatnonzero(cached | (holders > 0)).tolist())
        assert cache.num_idle == int((cached & (holders == 0)).sum())
        assert pool.num_free + int((holders > 0).sum()) + cache.num_idle == pool.num_blocks - 1
        stats = self.scheduler.stats()
        assert stats.num_running + stats.num_waiting == len(self.live)
        assert 0 <= stats.kv_waste < 1

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5_000):
            if not self.scheduler.has_work:
                break
            self.plan(count=3)
            self.collect(count=1)
            self.blocks_add_up()
        assert not self.live and not self.scheduler.has_work
        assert self.blocks.num_used == 0
        self.blocks.cache.evict(self.blocks.cache.num_idle)
        assert self.blocks.pool.num_free == self.blocks.num_usable


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSchedulerMachine = SchedulerMachine.TestCase
