"""The scheduler's rules, one at a time, over the device that checks what every span reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from isthmus.cache import BlockManager
from isthmus.contract import SpanMix
from isthmus.engine.messages import AddRequest, FinishReason, TokensOut, pack_tokens
from isthmus.errors import InvalidRequest, QueueFull
from isthmus.plan import StepPlan
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits
from isthmus.scheduler.forecast import OutputForecast, peak_tokens
from isthmus.scheduler.spans import MixedSpans
from isthmus.testing.checking_device import CheckingDevice, expected_tokens

VOCAB = 50


class Bench:
    """A scheduler and its device; keeps what came out."""

    def __init__(self, *, num_blocks: int = 65, block_size: int = 4, prefix_caching: bool = True, **limits) -> None:
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 100}
        self.limits = SchedulerLimits(**(defaults | limits))
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching, seed=b"test")
        self.scheduler = Scheduler(self.limits, self.blocks, clock=lambda: 100.0)
        self.device = CheckingDevice(
            rows=self.limits.max_num_seqs,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=self.limits.max_model_len,
            vocab_size=VOCAB,
        )
        self.requests: dict[int, AddRequest] = {}
        self.outputs: dict[int, list[TokensOut]] = {}

    def add(self, prompt: Sequence[int], *, priority: int = 0, salt: bytes = b"", arrival_s: float = 0.0, **sampling):
        number = len(self.requests)
        request = AddRequest(
            number,
            pack_tokens(prompt),
            RowSampling(**({"max_tokens": 8} | sampling)),
            priority=priority,
            cache_salt=salt,
            arrival_s=arrival_s,
        )
        self.scheduler.add(request)
        self.requests[number] = request
        self.outputs[number] = []
        return number

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        self.device.submit(plan)
        return plan

    def collect(self, invalid_rows: Sequence[int] = ()) -> list[TokensOut]:
        outputs = self.scheduler.update(self.device.collect(invalid_rows))
        for output in outputs:
            self.outputs[output.request_id].append(output)
        return outputs

    def step(self) -> StepPlan:
        plan = self.plan()
        self.collect()
        return plan

    def run(self) -> None:
        while self.scheduler.has_work:
            while (plan := self.scheduler.plan()) is not None:
                self.device.submit(plan)
            self.collect()

    def tokens(self, number: int) -> list[int]:
        return [token for output in self.outputs[number] for token in output.tokens]

    def expected(self, number: int) -> list[int]:
        return expected_tokens(self.requests[number], self.limits.max_model_len, VOCAB)

    def reason(self, number: int) -> FinishReason | None:
        return self.outputs[number][-1].finish_reason


def test_a_long_prompt_is_computed_in_chunks_beside_running_rows():
    bench = Bench(max_num_batched_tokens=10)
    short, long = bench.add([1, 2]), bench.add(range(30))
    assert bench.step().span_lengths.tolist() == [2, 8]
    assert bench.step().span_lengths.tolist() == [1, 9]
    assert bench.step().span_samples.tolist() == [True, False]
    bench.run()
    assert bench.tokens(short) == bench.expected(short) and bench.tokens(long) == bench.expected(long)


def test_rows_of_one_token_go_first_when_the_budget_is_short():
    lengths = MixedSpans().share(np.array([9, 1, 7, 1], np.int32), 10, False)
    assert lengths.tolist() == [8, 1, 0, 1]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_surplus_step_is_planned_at_a_length_limit(depth):
    bench = Bench(steps_in_flight=depth)
    number = bench.add([1, 2, 3], max_tokens=5)
    bench.run()
    assert bench.tokens(number) == bench.expected(number) and len(bench.tokens(number)) == 5
    assert bench.reason(number) is FinishReason.LENGTH
    assert bench.device.computed == 3 + 4


def test_the_context_limit_ends_a_sequence():
    bench = Bench(max_model_len=10)
    number = bench.add([1] * 7, max_tokens=50)
    bench.run()
    assert len(bench.tokens(number)) == 3 and bench.reason(number) is FinishReason.LENGTH


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_token_ends_it_and_surplus_tokens_are_dropped(depth):
    free = Bench()
    first = free.add([5, 6], max_tokens=8)
    free.run()
    stop = free.tokens(first)[3]
    bench = Bench(steps_in_flight=depth)
    number = bench.add([5, 6], max_tokens=8, stop_token_ids=(stop,))
    bench.run()
    assert bench.tokens(number) == free.tokens(first)[: free.tokens(first).index(stop) + 1]
    last = bench.outputs[number][-1]
    assert last.finish_reason is FinishReason.STOP and last.stop_token == stop == last.tokens[-1]
    assert bench.blocks.num_used == 0


def test_results_of_an_old_stay_never_reach_the_rows_next_owner():
    free = Bench()
    first = free.add([5, 6])
    free.run()
    bench = Bench(max_num_seqs=1, steps_in_flight=3)
    stopped = bench.add([5, 6], stop_token_ids=(free.tokens(first)[0],))
    follower = bench.add([7, 8, 9])
    for _ in range(3):
        bench.plan()
    bench.collect()
    assert bench.reason(stopped) is FinishReason.STOP
    assert bench.plan().starts[0].row == 0
    assert bench.collect() == bench.collect() == []
    bench.run()
    assert bench.tokens(stopped) == bench.expected(stopped) and bench.tokens(follower) == bench.expected(follower)


def test_blocks_return_in_the_step_in_which_a_request_ends():
    bench = Bench(prefix_caching=False)
    bench.add([1, 2, 3], max_tokens=1)
    bench.plan()
    assert bench.blocks.pool.num_free == 63
    bench.collect()
    assert bench.blocks.pool.num_free == 64


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preemption_computes_again_and_changes_no_token(depth):
    bench = Bench(num_blocks=9, max_num_seqs=3, steps_in_flight=depth, max_model_len=33)
    bench.scheduler._forecast.record(1)  # so that it expects short outputs, and admits too many
    numbers = [bench.add([i, i + 1, i + 2], max_tokens=20) for i in range(3)]
    bench.run()
    assert bench.scheduler.stats().preemptions > 0
    for number in numbers:
        assert bench.tokens(number) == bench.expected(number)
    assert bench.outputs[0][-1] is not None and bench.blocks.num_used == 0


def test_the_newest_of_the_lowest_priority_is_preempted():
    bench = Bench(num_blocks=7, block_size=4, max_num_seqs=3, max_model_len=24)
    bench.scheduler._forecast.record(1)
    old, urgent = bench.add([1] * 4, max_tokens=16, priority=1), bench.add([2] * 4, max_tokens=16, priority=0)
    while not bench.scheduler.stats().preemptions:
        bench.step()
    assert [sequence.request_id for sequence in bench.scheduler._waiting] == [old]
    bench.run()
    assert bench.tokens(old) == bench.expected(old) and bench.tokens(urgent) == bench.expected(urgent)


def test_lower_priority_numbers_start_first_then_arrival():
    bench = Bench(max_num_seqs=1)
    for i, priority in enumerate((1, 0, 0)):
        bench.add([i], priority=priority, max_tokens=1)
    finished: list[int] = []
    while bench.scheduler.has_work:
        bench.plan()
        finished += [output.request_id for output in bench.collect()]
    assert finished == [1, 2, 0]


def test_one_that_does_not_fit_is_overtaken_a_bounded_number_of_times():
    bench = Bench(num_blocks=9, max_overtakes=2, max_model_len=33, max_num_seqs=4)
    bench.add([1] * 8, max_tokens=16)
    bench.step()
    big = bench.add([2] * 20, max_tokens=8)
    small = [bench.add([3 + i], max_tokens=2) for i in range(4)]
    bench.plan()
    running = {sequence.request_id for sequence in bench.scheduler._running}
    assert running == {0, small[0], small[1]}
    bench.collect()
    bench.step()
    bench.step()
    assert not bench.outputs[small[2]], "a third one overtook"
    bench.run()
    for number in (big, *small):
        assert bench.tokens(number) == bench.expected(number)


def test_requests_that_can_never_run_are_refused():
    bench = Bench(num_blocks=5, max_model_len=30)
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.add([])
    with pytest.raises(InvalidRequest, match="30 tokens"):
        bench.add([1] * 30)
    with pytest.raises(InvalidRequest, match="5 KV blocks"):
        bench.add([1] * 10, max_tokens=8)
    bench.add([1] * 10, max_tokens=7)
    bench.run()


def test_a_full_queue_refuses():
    bench = Bench(max_waiting=1, max_num_seqs=2)
    for token in (1, 2, 3):  # two find rows free, one waits
        bench.add([token])
    with pytest.raises(QueueFull):
        bench.add([4])
    bench.run()


@pytest.mark.parametrize("depth", [1, 3])
def test_abort_frees_at_once_and_silences_steps_in_flight(depth):
    bench = Bench(steps_in_flight=depth, prefix_caching=False)
    gone, stays, waits = bench.add([1, 2]), bench.add([3, 4]), 77
    for _ in range(depth):
        bench.plan()
    assert bench.scheduler.abort([gone, gone, waits]) == [gone]
    assert bench.blocks.num_used == bench.blocks.blocks_for(2 + depth - 1)
    bench.run()
    assert not bench.outputs[gone] and bench.tokens(stays) == bench.expected(stays)
    assert bench.scheduler.abort([stays]) == []


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is():
    bench = Bench()
    bench.add(range(16), max_tokens=1)
    bench.run()
    again = bench.add(range(16), max_tokens=1)
    plan = bench.step()
    assert plan.span_starts.tolist() == [12] and plan.span_lengths.tolist() == [4]
    assert bench.outputs[again][0].num_cached_tokens == 12
    stats = bench.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (32, 12)


def test_generated_blocks_are_cached_too():
    bench = Bench()
    first = bench.add([1, 2, 3], max_tokens=10)
    bench.run()
    follow_up = bench.add([1, 2, 3, *bench.tokens(first), 9], max_tokens=1)
    bench.run()
    assert bench.outputs[follow_up][0].num_cached_tokens == 12


def test_salts_never_share():
    bench = Bench()
    bench.add(range(16), salt=b"a", max_tokens=1)
    bench.run()
    other = bench.add(range(16), salt=b"b", max_tokens=1)
    bench.run()
    assert bench.outputs[other][0].num_cached_tokens == 0


def test_a_shared_prefix_is_computed_once():
    bench = Bench(max_num_batched_tokens=16)
    numbers = [bench.add([*range(32), 40 + i], max_tokens=2) for i in range(4)]
    bench.run()
    assert bench.device.computed == 32 + 4 * (1 + 1)
    for number in numbers:
        assert bench.tokens(number) == bench.expected(number)


def test_waiting_for_a_prefix_is_bounded():
    bench = Bench(max_num_batched_tokens=8, max_deferrals=2, max_num_seqs=2)
    bench.add(range(64), max_tokens=1)
    bench.add(range(64), max_tokens=1)
    bench.plan()
    assert bench.scheduler.num_waiting == 1
    bench.run()
    assert bench.device.computed <= 2 * 64


def test_prompt_logprobs_come_whole_and_in_order_and_use_no_cached_prefix():
    bench = Bench(max_num_batched_tokens=7)
    bench.add(range(20), max_tokens=1)
    bench.run()
    number = bench.add(range(20), max_tokens=2, num_prompt_logprobs=1, num_logprobs=0)
    bench.run()
    pieces = [piece for output in bench.outputs[number] for piece in output.prompt_logprobs]
    assert pieces[0] is None and [piece.token for piece in pieces[1:]] == list(range(1, 20))
    assert all(len(piece.top) == 1 for piece in pieces[1:])
    first = bench.outputs[number][0]
    assert not first.tokens and first.num_cached_tokens == 0 and bench.outputs[number][1].num_cached_tokens == -1
    with_tokens = [output for output in bench.outputs[number] if output.tokens]
    assert [len(output.logprobs) for output in with_tokens] == [1, 1] and with_tokens[0].logprobs[0].top == ()


def test_a_prompt_of_one_token_has_one_empty_prompt_logprob():
    bench = Bench()
    number = bench.add([3], max_tokens=1, num_prompt_logprobs=0)
    bench.run()
    assert bench.outputs[number][0].prompt_logprobs == (None,)


def test_time_in_the_queue_goes_out_once():
    bench = Bench()
    number = bench.add([1], arrival_s=97.5, max_tokens=2)
    bench.run()
    assert [output.queued_s for output in bench.outputs[number]] == [2.5, 0.0]


def test_a_bad_row_ends_alone_and_leaves_nothing_in_the_cache():
    bench = Bench(steps_in_flight=2)
    bad, good = bench.add(range(10)), bench.add(range(20, 30))
    bench.plan()
    bench.plan()
    (row,) = (sequence.row for sequence in bench.scheduler._running if sequence.request_id == bad)
    bench.collect(invalid_rows=[row])
    assert bench.reason(bad) is FinishReason.ERROR and "finite" in bench.outputs[bad][-1].error
    bench.run()
    assert bench.tokens(good) == bench.expected(good) and bench.scheduler.stats().invalid_rows == 1
    again = bench.add(range(10))
    bench.run()
    assert bench.outputs[again][0].num_cached_tokens == 0


def test_a_failed_step_ends_its_requests_and_poisons_nobody():
    bench = Bench(steps_in_flight=2)
    failing = bench.add(range(12))
    plan = bench.plan()
    reader = bench.add([*range(12), 13])
    bench.plan()
    assert bench.scheduler.num_running == 2, "the second reads blocks that the first step should write"
    bench.device.drop()
    (output,) = bench.scheduler.fail_step(plan.step, "out of memory")
    assert (output.request_id, output.finish_reason, output.error) == (failing, FinishReason.ERROR, "out of memory")
    bench.device.drop()
    assert bench.scheduler.fail_step(plan.step + 1, "out of memory") != []
    assert len(bench.blocks.cache) == 0 and bench.blocks.num_used == 0 and bench.outputs[reader] == []


def test_whoever_ran_after_a_failed_step_begins_again():
    bench = Bench(steps_in_flight=2, max_num_batched_tokens=12)
    bench.add(range(12), max_tokens=1)
    plan = bench.plan()
    other = bench.add(range(30, 41))
    bench.plan()
    bench.device.drop()
    bench.scheduler.fail_step(plan.step, "out of memory")
    assert bench.collect() == []
    bench.run()
    assert bench.tokens(other) == bench.expected(other)


@pytest.mark.parametrize("most", [0, 2])
def test_spans_of_one_token_apart_where_the_device_does_not_mix_them(most: int):
    bench = Bench(span_mix=SpanMix.SINGLES_APART, max_long_spans=most, max_num_batched_tokens=16)
    numbers = [
        bench.add(range(place, place + length), max_tokens=4) for place, length in enumerate((3, 9, 40, 9, 1, 17))
    ]
    longest = 0
    while bench.scheduler.has_work:
        lengths = bench.step().span_lengths
        assert lengths.max() == 1 or lengths.min() > 1
        longest = max(longest, int((lengths > 1).sum()))
    assert longest == (most or 3)
    for number in numbers:
        assert bench.tokens(number) == bench.expected(number)


def test_no_more_steps_in_flight_than_allowed():
    bench = Bench(steps_in_flight=2)
    bench.add([1])
    bench.plan()
    bench.plan()
    assert bench.scheduler.plan() is None


def test_the_peak_is_that_of_the_worst_moment():
    # Held 10 and 20, with 5 and 2 to go: at the second's end 10 + 2 + 20 + 2, at the first's 10 + 5.
    assert peak_tokens(np.array([10.0, 20.0]), np.array([5.0, 2.0])) == 34
    assert peak_tokens(np.array([10.0, 1.0]), np.array([50.0, 2.0])) == 60


def test_a_forecast_is_the_mean_of_longer_outputs_lately():
    forecast = OutputForecast(prior=100)
    ask = lambda generated, room: forecast.remaining(np.array([generated]), np.array([room])).tolist()  # noqa: E731
    assert ask(0, 1000) == [100] and ask(300, 1000) == [300] and ask(0, 7) == [7]
    for length in (10, 20, 30):
        forecast.record(length)
    assert ask(0, 1000) == [20] and ask(10, 1000) == [15] and ask(30, 1000) == [100]


def test_admission_waits_for_the_peak_not_for_the_step():
    bench = Bench(num_blocks=17, max_num_seqs=8, max_model_len=65, max_num_batched_tokens=64)
    for length in (40, 40):
        bench.scheduler._forecast.record(length)
    for i in range(8):
        bench.add([i, i, i, i], max_tokens=40)
    bench.plan()
    assert bench.scheduler.num_running == 1, "two would hold 88 tokens at their peak, and 64 fit"
    bench.collect()
    bench.run()
    assert bench.scheduler.stats().preemptions == 0


def test_counters():
    bench = Bench()
    bench.add([1, 2, 3], max_tokens=3)
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.block_size) == (1, 0, 64, 4)
    assert (stats.num_free_blocks, stats.num_cached_blocks) == (63, 0)
    assert stats.kv_waste == 0.25
    assert (stats.prompt_tokens, stats.computed_tokens, stats.generation_tokens) == (3, 3, 1)
    assert stats.step_tokens == (3,) and bench.scheduler.stats().step_tokens == ()
