"""The names, labels and buckets that dashboards, autoscalers and routers rely on."""

from __future__ import annotations

import math
import time
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ENGINE_LABELS = {"model_name", "engine"}
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "isthmus:kv_waste_ratio",
    "isthmus:engine_heartbeat_age_seconds",
    "isthmus:engine_last_progress_timestamp_seconds",
    "isthmus:draining",
}
COUNTERS = {
    *("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prompt_tokens_cached", "vllm:prefix_cache_queries"),
    *("vllm:prefix_cache_hits", "vllm:num_preemptions", "vllm:corrupted_requests", "vllm:spec_decode_num_drafts"),
    *("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"),
}
LABELLED = {
    "vllm:num_requests_waiting_by_reason": {"reason"},
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
    "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    "vllm:request_success": {"finished_reason"},
    "isthmus:requests_aborted": {"cause"},
}
HISTOGRAMS = {
    f"vllm:{name}"
    for name in (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_n", "request_params_max_tokens", "iteration_tokens_total"),
        "request_max_num_generation_tokens",
    )
}
TTFT = (
    *("0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0"),
    *("7.5", "10.0", "20.0", "40.0", "80.0", "160.0", "640.0", "2560.0", "+Inf"),
)
ITL = (
    *("0.001", "0.002", "0.005", "0.01", "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75"),
    *("1.0", "2.5", "5.0", "7.5", "10.0", "20.0", "40.0", "80.0", "+Inf"),
)


def families(http: httpx.Client) -> dict[str, Any]:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def total(found: dict[str, Any], family: str, suffix: str = "", **labels: str) -> float:
    return sum(
        sample.value
        for sample in found[family].samples
        if sample.name == family + suffix and labels.items() <= sample.labels.items()
    )


def test_names_and_labels(http: httpx.Client) -> None:
    found = families(http)
    for name in GAUGES:
        assert found[name].type == "gauge", name
    for name in COUNTERS:
        assert found[name].type == "counter", name
        assert {sample.name for sample in found[name].samples} == {f"{name}_total"}
    for name in HISTOGRAMS:
        assert found[name].type == "histogram", name
    for name in GAUGES | COUNTERS | HISTOGRAMS | set(LABELLED):
        for sample in found[name].samples:
            wanted = ENGINE_LABELS | LABELLED.get(name, set())
            assert wanted <= set(sample.labels), (name, sample.labels)
            assert sample.labels["model_name"] == "toy" and sample.labels["engine"] == "0"
    assert {"reason", "model_name"} == set(found["vllm:admission_rejections"].samples[0].labels)
    assert found["process_resident_memory_bytes"].samples[0].value > 2**20


def test_buckets(http: httpx.Client) -> None:
    found = families(http)
    for name, bounds in (("time_to_first_token_seconds", TTFT), ("inter_token_latency_seconds", ITL)):
        seen = [sample.labels["le"] for sample in found[f"vllm:{name}"].samples if sample.name.endswith("_bucket")]
        assert tuple(seen) == bounds
    for name in HISTOGRAMS:
        counts = [sample.value for sample in found[name].samples if sample.name.endswith("_bucket")]
        assert counts == sorted(counts)
        assert counts[-1] == total(found, name, "_count")


def test_values_follow_requests(http: httpx.Client) -> None:
    before = families(http)
    for stream in (False, True):
        body = {"prompt": "count me", "max_tokens": 20, "ignore_eos": True, "stream": stream}
        assert http.post("/v1/completions", json=body).status_code == 200
    after = families(http)

    def rise(family: str, suffix: str, **labels: str) -> float:
        return total(after, family, suffix, **labels) - total(before, family, suffix, **labels)

    assert rise("vllm:generation_tokens", "_total") == 40
    assert rise("vllm:prompt_tokens", "_total") == 16
    assert rise("vllm:request_success", "_total", finished_reason="length") == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert rise(f"vllm:{name}", "_count") == 2
    assert rise("vllm:inter_token_latency_seconds", "_count") == 38
    assert rise("vllm:request_generation_tokens", "_sum") == 40
    assert rise("http_requests", "_total", handler="/v1/completions", status="2xx") == 2
    assert rise("http_request_duration_seconds", "_count", handler="/v1/completions") == 2
    http.get("/no/such/path/1")
    http.get("/no/such/path/2")
    handlers = {sample.labels["handler"] for sample in families(http)["http_requests"].samples}
    assert "none" in handlers and not any("such" in handler for handler in handlers)


def test_steps_are_counted(http: httpx.Client) -> None:
    before = total(families(http), "vllm:iteration_tokens_total", "_count")
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 50, "ignore_eos": True})
    deadline = time.monotonic() + 5
    while total(families(http), "vllm:iteration_tokens_total", "_count") < before + 50:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_heartbeat_is_fresh(http: httpx.Client) -> None:
    found = families(http)
    assert 0 <= total(found, "isthmus:engine_heartbeat_age_seconds") < 3
    assert abs(total(found, "isthmus:engine_last_progress_timestamp_seconds") - time.time()) < 5
    assert total(found, "isthmus:draining") == 0
    assert math.isfinite(total(found, "vllm:kv_cache_usage_perc"))
