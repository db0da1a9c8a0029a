"""``/metrics``: the names, labels and buckets that vLLM's dashboards, autoscalers and routers read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.engine.messages import EngineReady, EngineStats, FinishReason
from isthmus_server.lifecycle import Lifecycle
from isthmus_server.telemetry import Histogram, Telemetry

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_LABELS: Final = ("model_name", "engine")


class EngineCollector(Collector):
    """Everything under ``vllm:`` and ``isthmus:``, for the one engine of this server."""

    def __init__(self, model_name: str, telemetry: Telemetry, lifecycle: Lifecycle) -> None:
        self._labels = (model_name, "0")
        self._model_name = model_name
        self._telemetry = telemetry
        self._lifecycle = lifecycle
        self.ready: EngineReady | None = None
        """Set once the engine has said what it settled on."""

    def collect(self) -> Iterator[Metric]:
        stats = self._telemetry.stats or EngineStats(monotonic_s=0.0, last_progress_s=0.0)
        yield from self._gauges(stats)
        yield from self._info()
        yield from self._engine_counters(stats)
        yield from self._server_counters()
        yield from self._histograms()
        yield from self._http()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        used = stats.num_blocks - stats.num_free_blocks
        yield self._gauge("vllm:num_requests_running", "Requests that hold a row of the device.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.", stats.num_waiting)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Waiting requests by what they wait for.",
            labels=(*_LABELS, "reason"),
        )
        reasons.add_metric((*self._labels, "capacity"), stats.num_waiting)
        reasons.add_metric((*self._labels, "deferred"), 0)
        yield reasons
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used / stats.num_blocks if used else 0.0
        )
        yield self._gauge(
            "isthmus:kv_waste_ratio", "Share of the slots held by running requests without a token.", stats.kv_waste
        )
        yield self._gauge("isthmus:kv_cached_blocks", "KV blocks that the prefix cache holds.", stats.num_cached_blocks)
        yield self._gauge("isthmus:kv_free_blocks", "KV blocks that a request could take now.", stats.num_free_blocks)
        age = time.monotonic() - stats.monotonic_s if stats.monotonic_s else 0.0
        progress_age = time.monotonic() - stats.last_progress_s if stats.last_progress_s else 0.0
        yield self._gauge("isthmus:engine_heartbeat_age_seconds", "Seconds since the engine's last heartbeat.", age)
        yield self._gauge(
            "isthmus:engine_last_progress_timestamp_seconds",
            "Unix time at which the engine last computed a token or had nothing to do.",
            time.time() - progress_age if progress_age else 0.0,
        )
        yield self._gauge("isthmus:draining", "1 while the server shuts down.", float(self._lifecycle.draining))
        yield self._gauge("isthmus:http_requests_in_flight", "Generations in progress.", len(self._lifecycle.running))

    def _info(self) -> Iterator[Metric]:
        ready = self.ready
        if ready is not None:
            settled = {
                "block_size": str(ready.block_size),
                "num_gpu_blocks": str(ready.num_blocks),
                "max_model_len": str(ready.max_model_len),
                "max_num_seqs": str(ready.max_num_seqs),
                "max_num_batched_tokens": str(ready.max_num_batched_tokens),
                "cache_dtype": ready.dtype,
                "backend": ready.backend,
                "device": ready.device_name,
            }
            yield self._one("vllm:cache_config_info", "What the KV cache settled on.", settled)
        lora = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        yield self._one("vllm:lora_requests_info", "Adapters in use.", lora)

    def _one(self, name: str, text: str, labels: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=(*_LABELS, *labels))
        family.add_metric((*self._labels, *labels.values()), 1.0)
        return family

    def _engine_counters(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("num_preemptions", "Requests that lost their blocks and were computed again.", stats.preemptions),
            ("corrupted_requests", "Rows whose logits held no usable number.", stats.invalid_rows),
            ("spec_decode_num_drafts", "Drafts proposed.", 0),
            ("spec_decode_num_draft_tokens", "Tokens proposed by drafts.", 0),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", 0),
        ):
            yield self._counter(f"vllm:{name}", text, value)
        yield self._counter("isthmus:engine_steps", "Steps that the engine has taken.", stats.steps)
        yield self._counter("isthmus:computed_tokens", "Positions that the device has computed.", stats.computed_tokens)
        compiled = "Programs that the device had to compile while it served."
        yield self._counter("isthmus:late_compiles", compiled, stats.late_compiles)

    def _server_counters(self) -> Iterator[Metric]:
        seen = self._telemetry
        yield self._counter("vllm:prompt_tokens", "Prompt tokens of requests that were taken.", seen.prompt_tokens)
        yield self._counter("vllm:prompt_tokens_cached", "Of those, found in the prefix cache.", seen.cached_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", seen.generation_tokens)
        success = CounterMetricFamily("vllm:request_success", "Finished.", labels=(*_LABELS, "finished_reason"))
        for ended in FinishReason:
            success.add_metric((*self._labels, str(ended)), seen.finished[str(ended)])
        yield success
        rejected = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused before they ran.", labels=("model_name", "reason")
        )
        for reason in ("queue_full", "invalid", "draining", "not_ready", "engine_dead", "error"):
            rejected.add_metric((self._model_name, reason), seen.rejected[reason])
        yield rejected
        aborted = CounterMetricFamily("isthmus:requests_aborted", "Requests cut short.", labels=(*_LABELS, "cause"))
        for cause in ("disconnect", "shutdown", "engine_dead", "error"):
            aborted.add_metric((*self._labels, cause), seen.aborted[cause])
        yield aborted

    def _histograms(self) -> Iterator[Metric]:
        seen = self._telemetry
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", seen.ttft),
            ("inter_token_latency_seconds", "Gap between two outputs of a request.", seen.itl),
            ("request_time_per_output_token_seconds", "Mean gap within a request.", seen.time_per_output_token),
            ("e2e_request_latency_seconds", "Arrival to end.", seen.e2e),
            ("request_queue_time_seconds", "Arrival to first scheduled.", seen.queue),
            ("request_prefill_time_seconds", "First scheduled to first token.", seen.prefill),
            ("request_decode_time_seconds", "First token to last.", seen.decode),
            ("request_inference_time_seconds", "First scheduled to last token.", seen.inference),
            ("request_prompt_tokens", "Prompt tokens of a request.", seen.prompt_lengths),
            ("request_generation_tokens", "Tokens generated for a request.", seen.generation_lengths),
            ("request_max_num_generation_tokens", "The most of a request's choices.", seen.max_generation_lengths),
            ("request_params_n", "Choices asked for.", seen.params_n),
            ("request_params_max_tokens", "Token limit asked for.", seen.params_max_tokens),
            ("iteration_tokens_total", "Tokens computed in a step.", seen.step_tokens),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            _add(family, self._labels, histogram)
            yield family

    def _http(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("http_requests", "Requests answered.", labels=("handler", "method", "status"))
        for key, count in self._telemetry.http.items():
            requests.add_metric(key, count)
        yield requests
        durations = HistogramMetricFamily(
            "http_request_duration_seconds", "Request to end of answer.", labels=("handler", "method")
        )
        for pair, histogram in self._telemetry.http_durations.items():
            _add(durations, pair, histogram)
        yield durations


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    cumulative = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        cumulative += count
        buckets.append(("+Inf" if math.isinf(bound) else str(bound), cumulative))
    family.add_metric(labels, buckets, histogram.total)


class Exposition:
    """Renders the registry of one server."""

    def __init__(self, collector: EngineCollector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)
