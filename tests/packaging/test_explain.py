"""``isthmus explain``: what start-up would settle, and nothing loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.contract import GraphScope
from isthmus.errors import Unsupported
from isthmus.explain import explain
from isthmus.reference import REFERENCE_CAPABILITIES
from isthmus.testing.null import NullBackend
from isthmus.testing.tiny_model import write_tiny_model
from isthmus_cpu import backend
from isthmus_server.cli.app import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()
    return folder


def options(folder: Path, device: str = "cpu", **changes: object) -> EngineOptions:
    fields = {
        "model": ModelOptions(model=str(folder), dtype="float32"),
        "cache": CacheOptions(num_blocks=40),
        "scheduler": SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=128),
        "backend": BackendOptions(device=device, options={"kernels": "off"} if device == "cpu" else {}),
    }
    return EngineOptions(**(fields | changes))  # type: ignore[arg-type]


def test_the_ledger_counts_weights_and_cache_without_a_weight_file(model: Path) -> None:
    found = explain(options(model), request_tokens=100)
    assert found.ledger is not None and not found.problem
    layer = 128 * (4 + 2 * 2) * 64 + 4 * 64 * 128 + 3 * 128 * 160 + 2 * 128
    assert found.num_parameters == 2 * 259 * 128 + 128 + 2 * layer
    assert found.ledger.weights == 4 * found.num_parameters
    assert found.ledger.kv_per_token == 2 * 2 * 2 * 64 * 4  # keys and values, layers, heads, numbers, bytes
    assert found.ledger.kv == 41 * 16 * found.ledger.kv_per_token
    assert found.kv_tokens == 640
    assert found.requests == 40 // 7  # 100 tokens take seven blocks of 16
    assert found.steps_in_flight == 2 and found.max_num_seqs == 8


def test_downgrades_come_with_their_reasons(model: Path) -> None:
    notes = "\n".join(explain(options(model, scheduler=SchedulerOptions(overlap=False))).downgrades)
    assert "every step runs eagerly: the backend declares no graph capture" in notes
    assert "overlap is switched off" in notes


def test_graphs_of_steps_that_hold_prompts_are_told_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = dataclasses.replace(
        REFERENCE_CAPABILITIES, graph_scope=GraphScope.STEP, mixed_graph_tokens=(16, 100, 1000)
    )
    for name in ("COMPILED", "PLAIN"):
        monkeypatch.setattr(backend, name, captures)
    found = explain(options(model))
    assert found.graph_sizes == (1, 2, 4, 8) and found.mixed_graph_sizes == (16, 100, 128) and found.num_graphs == 7
    assert "for steps that hold prompts of up to 16, 100, 128 tokens" in found.text()


def test_what_will_be_refused_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(REFERENCE_CAPABILITIES, logprobs=False, prompt_logprobs=False)
    for name in ("COMPILED", "PLAIN"):
        monkeypatch.setattr(backend, name, few)
    monkeypatch.setattr(NullBackend, "capabilities", few)
    for device in ("cpu", "null"):
        notes = explain(options(model, device=device)).downgrades
        assert "log-probabilities are refused: the backend does not declare them" in notes
        assert "log-probabilities of prompts are refused: the backend does not declare them" in notes


def test_what_does_not_fit_is_said_and_not_raised(model: Path) -> None:
    found = explain(options(model, cache=CacheOptions(num_blocks=2)))
    assert "needs" in found.problem and found.kv_tokens == 32
    assert "cannot be served so" in found.text()


def test_what_the_backend_does_not_take_is_refused_as_at_start_up(model: Path) -> None:
    with pytest.raises(Unsupported, match="float16"):
        explain(options(model, model=ModelOptions(model=str(model), dtype="float16")))


def test_a_backend_without_parts_is_explained_by_its_capabilities(model: Path) -> None:
    found = explain(options(model, device="null"))
    assert found.ledger is None and "runs whole steps by itself" in found.text()


def test_the_command_prints_text_or_json(model: Path) -> None:
    arguments = ["explain", str(model), "--device", "cpu", "--backend-option", "kernels=off", "--dtype", "float32"]
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 0, text.output
    for words in ("weights", "KV cache", "workspace", "graphs", "providers", "in flight", "downgrades"):
        assert words in text.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--request-tokens", "64", "--json"]).output)
    assert found["request_tokens"] == 64 and found["ledger"]["weights"] > 0
    short = CliRunner().invoke(app, [*arguments, "--kv-cache-memory", "64KiB", "--max-model-len", "256"])
    assert short.exit_code == 1 and "cannot be served so" in short.output
