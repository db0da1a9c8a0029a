"""What ``isthmus bench --trace`` writes: lanes of the host and of the device, on one clock."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from isthmus import LLM, SamplingParams
from isthmus.errors import IsthmusError
from isthmus.testing.tiny_model import write_tiny_model
from isthmus.testing.toy_model import write_toy_model
from isthmus.trace import HOST_LANES, Trace, _fill, _Slice, busy_share, tracing
from isthmus_server.cli.bench import app

OUTPUT = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")


def lanes(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Slices by the name of their lane."""
    events = document["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault(names[event["pid"], event["tid"]], []).append(event)
    return found


def record(llm: LLM, path: Path) -> Trace:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    with tracing(llm, path) as trace:
        llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)
    return trace


def test_the_lanes_of_each_step(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with LLM(str(model), device="cpu", skip_tokenizer_init=True, progress=False, num_blocks=40) as llm:
        engine = llm._core
        before = engine._scheduler, engine._executor
        trace = record(llm, path)
        assert (engine._scheduler, engine._executor) == before, "the recording left something behind"
        assert "_launch" not in vars(engine._executor)
    found = lanes(json.loads(path.read_text()))
    assert set(found) == {*HOST_LANES, "steps"}
    numbers = list(range(found["submit"][0]["args"]["step"], found["submit"][0]["args"]["step"] + OUTPUT))
    for lane in ("submit", "collect", "update", "steps"):
        assert [event["args"]["step"] for event in found[lane]] == numbers, lane
    for submitted, ran, collected in zip(found["submit"], found["steps"], found["collect"], strict=True):
        assert submitted["ts"] <= ran["ts"] < ran["ts"] + ran["dur"] <= collected["ts"] + collected["dur"]
    assert trace.steps == OUTPUT
    assert trace.device_busy is not None and 0.0 < trace.device_busy <= 1.0
    assert trace.decode_busy is not None and 0.0 < trace.decode_busy <= 1.0
    assert f"device busy {trace.device_busy:.1%}" in trace.text()


def test_a_name_that_ends_in_gz_is_compressed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with LLM(str(model), device="cpu", skip_tokenizer_init=True, progress=False, num_blocks=40) as llm:
        record(llm, path)
    assert set(lanes(json.loads(gzip.decompress(path.read_bytes())))) == {*HOST_LANES, "steps"}


def test_where_it_cannot_be_written_nothing_runs(model: Path, tmp_path: Path) -> None:
    with LLM(str(model), device="cpu", skip_tokenizer_init=True, progress=False, num_blocks=40) as llm:
        with pytest.raises(IsthmusError, match="cannot be written"):
            record(llm, tmp_path / "nowhere" / "trace.json")
        assert llm.stats().steps == 0


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_the_command_without_anything_that_tells_of_the_device(tmp_path: Path, kind: str) -> None:
    """An executor of a backend's own: the host's lanes alone, and no share."""
    toy = write_toy_model(tmp_path / "toy")
    path = tmp_path / "trace.json"
    size = ["--num-requests", "4"] if kind == "throughput" else ["--num-batches", "1", "--batch-size", "2"]
    arguments = [kind, str(toy), "--device", "null", "--output-tokens", "6", *size, "--trace", str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)["trace"]
    assert figures["file"] == str(path) and figures["steps"] >= 6 and figures["device_busy"] is None
    assert set(figures["host_s"]) == set(lanes(json.loads(path.read_text()))) == set(HOST_LANES)


class EvenTheProcessor(set[object]):
    """torch's profiler of the processor, in place of a device's."""

    def __sub__(self, other: object) -> set[object]:
        return set(self)


def test_our_lanes_stand_on_the_profilers_clock(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.trace._device_type", lambda executor: "other")
    known = EvenTheProcessor({torch.profiler.ProfilerActivity.CPU})
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: known)
    path = tmp_path / "trace.json"
    with LLM(str(model), device="cpu", skip_tokenizer_init=True, progress=False, num_blocks=40) as llm:
        collect = llm._core._executor.collect

        def marked() -> Any:
            with torch.profiler.record_function("waiting"):
                return collect()

        monkeypatch.setattr(llm._core._executor, "collect", marked)
        trace = record(llm, path)
    events = json.loads(path.read_text())["traceEvents"]
    theirs = [event for event in events if event.get("name") == "waiting"]
    ours = [event for event in events if event.get("cat") == "host" and event["name"].startswith("collect")]
    assert len(theirs) == len(ours) == OUTPUT == trace.steps
    for inner, outer in zip(theirs, ours, strict=True):
        assert outer["ts"] - 500 < inner["ts"] < outer["ts"] + outer["dur"] + 500, "more than half a millisecond apart"
    assert trace.device_busy is None  # the processor's own events are no device's


def test_a_profilers_device_events_count_once_where_they_overlap() -> None:
    assert busy_share([(0, 4), (2, 6), (8, 9), (8.5, 30)], 1, 11) == pytest.approx(0.8)
    assert busy_share([], 1, 11) == 0.0


def test_device_time_is_read_from_the_profilers_own_clock() -> None:
    """Its times are microseconds from an origin that it names; a step of several tokens ends what is not decoding."""
    base = 1_700_000_000_000_000_000
    slices = []
    for step in range(12):
        begin = base + step * 100_000
        tokens = 64 if step == 1 else 2
        slices.append(_Slice("submit", begin, begin + 1_000, step, tokens, 2))
        slices.append(_Slice("collect", begin + 50_000, begin + 100_000, step))
    kernels = [
        {
            "ph": "X",
            "cat": "kernel",
            "name": "k",
            "pid": 0,
            "tid": 7,
            "ts": step * 100.0,
            "dur": 90.0 if step > 1 else 10,
        }
        for step in range(12)
    ]
    other = {"ph": "X", "cat": "gpu_user_annotation", "name": "all", "pid": 0, "tid": 7, "ts": 0.0, "dur": 1200.0}
    trace = Trace(Path("x"))
    _fill(trace, slices, {"traceEvents": [*kernels, other], "baseTimeNanoseconds": base})
    assert trace.wall_s == pytest.approx(1.2e-3)
    assert trace.device_busy == pytest.approx((2 * 10 + 10 * 90) / 1200)
    assert trace.decode_busy == pytest.approx(0.9)
