"""The engine on torch_tpu with a CPU client, and what libtpu makes of the engine's own steps for chips that are not
there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MEBI = 2**20

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def start(
    run_script: Callable[..., dict[str, Any]], cpu_as_tpu: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Runs engine_steps.py; programs on the disk are shared between calls, those in shared memory are not."""
    settings = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), **cpu_as_tpu}

    def run(name: str, *arguments: str) -> dict[str, Any]:
        apart = {"TORCH_TPU_TIER2_COMPILATION_CACHE": f"{name}-{os.getpid()}"}
        return run_script("engine_steps.py", *arguments, **settings, **apart)

    return run


@pytest.fixture(scope="module")
def first(start: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return start("first")


@pytest.fixture(scope="module")
def larger(start: Callable[..., dict[str, Any]], first: dict[str, Any], folder: Path) -> dict[str, Any]:
    return start("second", "--stablehlo", str(folder))


def test_tokens_are_the_references(first: dict[str, Any]) -> None:
    engine = first["engine"]
    assert all(engine["equal"].values()), engine["equal"]
    assert engine["preemptions"] > 0 and engine["prefix_hits"] > 0


def test_every_shape_is_a_program_and_nothing_compiles_afterwards(first: dict[str, Any]) -> None:
    """By torch_tpu's own counts, in which an operation outside of programs is one too."""
    engine = first["engine"]
    assert engine["graphs"] == engine["shapes"] == 6
    assert engine["compiled_at_start"] > engine["graphs"]
    assert engine["missed_while_serving"] == engine["late_compiles"] == 0


def test_who_serves_what(first: dict[str, Any]) -> None:
    assert "donated" in first["providers"]["graphs"], "torch_tpu is another than in_place.py was written for"
    assert first["providers"]["route"].startswith("torch_tpu: torch_tpu 0.2.0")


def test_the_next_start_finds_its_programs_on_the_disk(first: dict[str, Any], start: Callable[..., Any]) -> None:
    again = start("third")["engine"]
    # Not 0: while torch_tpu waits for the disk it compiles as well, and takes what is there first.
    assert again["compiled_at_start"] < first["engine"]["compiled_at_start"]
    assert all(again["equal"].values())


def test_a_larger_engine_in_bfloat16_runs(larger: dict[str, Any]) -> None:
    assert larger["larger"]["tokens"] == [larger["greedy_tokens"]] * 2
    assert larger["larger"]["steps"] == 2, "one of single tokens, one of longer spans"


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_engines_steps_compile_for_a_tpu_and_copy_no_cache(
    larger: dict[str, Any], folder: Path, topology: str
) -> None:
    sys.path.insert(0, str(HERE))
    try:
        from aot_compile import environment
    finally:
        sys.path.remove(str(HERE))
    command = [sys.executable, str(HERE / "aot_compile.py"), "--topology", topology, "--programs", str(folder)]
    done = subprocess.run(command, env=environment(topology), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    written = larger["larger"]["kv_bytes"] + larger["larger"]["table_bytes"]
    for step in json.loads(done.stdout.splitlines()[-1]):
        # Aliased sizes are rounded up to whole tiles.
        assert written <= step["alias_bytes"] <= written + MEBI
        assert step["temp_bytes"] <= 8 * MEBI
