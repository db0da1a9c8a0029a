"""The certification kit: it certifies what is sound, and catches a backend in each lie it may tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.testing.certify import certify

LIES = {
    # lie: (tests to run, the one that has to fail)
    "window": ("test_windows", "test_windows[16]"),
    "softcap": ("test_soft_caps", "test_soft_caps"),
    "blocks": ("test_mixtures", "test_mixtures_of_spans_over_random_block_tables[0]"),
    "leak": ("gives_its_memory_back", "test_an_executor_gives_its_memory_back"),
    "coarse": ("test_linear", "test_linear[float32-plain-576-131]"),
    "bias": ("test_linear", "test_linear[float32-bias-64-96]"),
    "shape": ("test_gated", "test_gated_activation[float32-48-silu]"),
    "seed": ("test_a_draw_depends", "test_a_draw_depends_on_its_seed_and_position_alone"),
    "top_p": ("test_draws_have", "test_draws_have_the_distribution_asked_for[top_p]"),
    "penalties": ("test_masks", "test_masks_biases_and_penalties[repetition_penalty]"),
    "batch": ("test_a_bad_row", "test_a_bad_row_is_marked_and_spoils_no_other[greedy]"),
    "logprobs": ("test_logprobs_are", "test_logprobs_are_of_the_models_own_logits[{}-1]"),
    "tokens": ("test_a_token_is_read", "test_a_token_is_read_when_the_step_runs"),
    "fetch": ("test_what_was_fetched", "test_what_was_fetched_is_a_copy"),
    "thread": ("test_the_device_closes", "test_the_device_closes"),
    "graphs": ("graphs", "test_graphs_are_captured_where_they_are_declared"),
    "buckets": ("test_capabilities_make_sense", "test_capabilities_make_sense"),
    "nothing": ("test_capabilities_make_sense", "test_capabilities_make_sense"),
    "options": ("test_an_unknown_option", "test_an_unknown_option_is_an_error_of_one_line"),
    "skips": ("test_greedy", "test_greedy_takes_the_likeliest_and_the_lowest_of_equals[7]"),
}
DRIVER = """
import json, os, sys, pytest
lies, folder = json.loads(sys.argv[1]), sys.argv[2]
common = ["-q", "--pyargs", "isthmus.testing.suite", "-c", os.devnull, "-p", "no:cacheprovider",
          "-p", "isthmus.testing.plugin", "--import-mode=importlib", "--isthmus-device=liar"]
for lie, select in lies.items():
    pytest.main([*common, f"--isthmus-option=lie={lie}", "-k", select, f"--isthmus-report={folder}/{lie}.jsonl"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the liar is installed, for PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    (site / "liar.py").write_text((Path(__file__).parent / "liar.py").read_text())
    info = site / "liar_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liar-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[isthmus.backends]\nliar = liar\n")
    return site


@pytest.fixture(scope="module")
def failures(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By lie: the tests that failed, and why.  One process for all: torch takes longest to import."""
    folder = tmp_path_factory.mktemp("reports")
    asked = json.dumps({lie: select for lie, (select, _) in LIES.items()})
    environment = os.environ | {"PYTHONPATH": str(site), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, asked, str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, dict[str, str]] = {}
    for lie in LIES:
        events = map(json.loads, (folder / f"{lie}.jsonl").read_text().splitlines())
        found[lie] = {
            event["test"].partition("::")[2]: event["reason"] for event in events if event.get("outcome") == "failed"
        }
    return found


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught(failures: dict[str, dict[str, str]], lie: str) -> None:
    assert LIES[lie][1] in failures[lie], f"found: {failures[lie]}"


def test_what_failed_is_said_in_a_line_that_names_the_shape(failures: dict[str, dict[str, str]]) -> None:
    assert "the shape is (1, 47); it must be (1, 48)" in failures["shape"]["test_gated_activation[float32-48-silu]"]
    reason = failures["window"]["test_windows[16]"]
    assert "attention of step" in reason and "it must be" in reason and "\n" not in reason
    assert "may not be skipped" in next(iter(failures["skips"].values()))


def test_the_cpu_is_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = certify("cpu")
    assert report.certified, report.text()
    assert not list(tmp_path.iterdir()), "the kit leaves files where it runs"
    assert report.seconds < 180
    assert "CERTIFIED: cpu passed" in report.text() and json.loads(report.to_json())["certified"]


@pytest.mark.slow
def test_the_cpu_without_its_kernels_is_certified() -> None:
    report = certify("cpu", {"kernels": "off"})
    assert report.certified, report.text()


def test_a_backend_without_parts_is_certified_on_plans_and_engines() -> None:
    report = certify("null")
    assert report.certified, report.text()
    assert {"plans", "engine", "capabilities"} <= {test.split("::")[0][5:-3] for test in report.passed}
    assert "parts (the backend runs whole steps by itself)" in report.undeclared


def test_a_part_of_the_kit_certifies_nothing() -> None:
    report = certify("null", select="test_capabilities")
    assert report.passed and not report.failures and not report.certified
    assert "only the whole kit certifies" in report.text()


def test_a_process_that_dies_is_told_with_the_test(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    report = certify("liar", {"lie": "dies"}, select="test_greedy or test_memory")
    assert not report.certified and "exit status 9" in report.died
    assert "test_sampling.py::test_greedy" in report.died
    assert "--isthmus-option=lie=dies" in report.failures[0].repeat


def test_a_device_that_cannot_be_opened_is_one_line() -> None:
    report = certify("no-such-backend")
    assert not report.certified and "no backend 'no-such-backend' is installed" in report.text()
