"""Counts and durations, kept where they arise at the price of an addition.

``prometheus_client``'s own histograms take a lock and walk their buckets; at tens of thousands of
tokens a second that is a noticeable part of the event loop.  These are plain lists that the
collector turns into families when ``/metrics`` is read.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from typing import Final

from isthmus.engine.messages import EngineStats, FinishReason
from isthmus_server.api_error import ApiError

TTFT_BOUNDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BOUNDS: Final = (
    # The first three are finer than vLLM's: on a fast device every gap is under 10 ms.
    *(0.001, 0.002, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BOUNDS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
STEP_BOUNDS: Final = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
N_BOUNDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0)
HTTP_BOUNDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)


def length_bounds(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to ``max_model_len``, as vLLM has them."""
    bounds: list[float] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > max_model_len:
                return tuple(bounds) or (1.0,)
            bounds.append(float(mantissa * scale))
        scale *= 10


class Histogram:
    """Counts by bucket; ``bounds`` are inclusive upper ends, and one more bucket is unbounded."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Telemetry:
    """All that the server measures itself, and the engine's last heartbeat."""

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_BOUNDS)
        self.itl = Histogram(ITL_BOUNDS)
        self.time_per_output_token = Histogram(ITL_BOUNDS)
        self.e2e = Histogram(LATENCY_BOUNDS)
        self.queue = Histogram(LATENCY_BOUNDS)
        self.prefill = Histogram(LATENCY_BOUNDS)
        self.decode = Histogram(LATENCY_BOUNDS)
        self.inference = Histogram(LATENCY_BOUNDS)
        self.params_n = Histogram(N_BOUNDS)
        self.step_tokens = Histogram(STEP_BOUNDS)
        self.finished: Counter[str] = Counter()
        self.aborted: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.http: Counter[tuple[str, str, str]] = Counter()
        """By handler, method and class of status ("2xx")."""
        self.http_durations: dict[tuple[str, str], Histogram] = {}
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.stats: EngineStats | None = None
        self.set_max_length(131072)

    def set_max_length(self, max_model_len: int) -> None:
        """Starts the histograms of lengths, with buckets up to what the model takes."""
        bounds = length_bounds(max_model_len)
        self.prompt_lengths = Histogram(bounds)
        self.generation_lengths = Histogram(bounds)
        self.max_generation_lengths = Histogram(bounds)
        self.params_max_tokens = Histogram(bounds)

    def saw_stats(self, stats: EngineStats) -> None:
        """Takes a heartbeat; one that was seen before is left out.

        Heartbeats are looked at now and then, so one may be missed, with the sizes of its steps.
        Those steps are counted at their mean: number and sum of the histogram stay right.
        """
        before = self.stats
        if before is not None and stats.monotonic_s <= before.monotonic_s:
            return
        self.stats = stats
        for tokens in stats.step_tokens:
            self.step_tokens.observe(tokens)
        missed = stats.steps - (before.steps if before else 0) - len(stats.step_tokens)
        if missed > 0:
            computed = stats.computed_tokens - (before.computed_tokens if before else 0) - sum(stats.step_tokens)
            self.step_tokens.observe(max(0.0, computed / missed), missed)

    def saw_rejection(self, error: ApiError) -> None:
        """A request was answered with ``error`` before anything was generated for it."""
        known = error.code in ("queue_full", "draining", "not_ready", "engine_dead")
        self.rejected[error.code if known and error.code else "invalid" if error.status < 500 else "error"] += 1

    def saw_http(self, handler: str, method: str, status: int, duration_s: float) -> None:
        self.http[handler, method, f"{status // 100}xx"] += 1
        histogram = self.http_durations.get((handler, method))
        if histogram is None:
            histogram = self.http_durations[handler, method] = Histogram(HTTP_BOUNDS)
        histogram.observe(duration_s)


class SequenceTimes:
    """Times of one sequence, from its arrival to its end; reports each to a :class:`Telemetry`."""

    __slots__ = ("_arrival_s", "_first_s", "_last_s", "_telemetry", "num_tokens", "queued_s")

    def __init__(self, telemetry: Telemetry, arrival_s: float) -> None:
        self._telemetry = telemetry
        self._arrival_s = arrival_s
        self._first_s = 0.0
        self._last_s = 0.0
        self.queued_s = 0.0
        self.num_tokens = 0

    @property
    def ttft_s(self) -> float | None:
        return self._first_s - self._arrival_s if self._first_s else None

    def tokens(self, count: int, queued_s: float) -> None:
        """``count`` more tokens have come, just now."""
        now = time.monotonic()
        if self._first_s:
            self._telemetry.itl.observe(now - self._last_s)
        else:
            self._first_s = now
            self.queued_s = queued_s
            self._telemetry.ttft.observe(now - self._arrival_s)
        self._last_s = now
        self.num_tokens += count
        self._telemetry.generation_tokens += count

    def finished(self, reason: FinishReason, num_prompt_tokens: int) -> None:
        telemetry = self._telemetry
        telemetry.finished[str(reason)] += 1
        telemetry.prompt_lengths.observe(num_prompt_tokens)
        telemetry.generation_lengths.observe(self.num_tokens)
        telemetry.e2e.observe(time.monotonic() - self._arrival_s)
        if not self._first_s:
            return
        started = self._arrival_s + self.queued_s
        telemetry.queue.observe(self.queued_s)
        telemetry.prefill.observe(max(0.0, self._first_s - started))
        telemetry.decode.observe(self._last_s - self._first_s)
        telemetry.inference.observe(max(0.0, self._last_s - started))
        if self.num_tokens > 1:
            telemetry.time_per_output_token.observe((self._last_s - self._first_s) / (self.num_tokens - 1))
