"""What libtpu makes of the kernel and of decode steps, for chips that are not there: compiled, never run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MEBI = 2**20
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=TOPOLOGIES)
def compiled(request: pytest.FixtureRequest, torch_tpu_step: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, str(HERE))
    try:
        from aot_compile import environment
    finally:
        sys.path.remove(str(HERE))
    script, stablehlo = str(HERE / "aot_compile.py"), torch_tpu_step["path"]
    command = [sys.executable, script, "--topology", request.param, "--stablehlo", stablehlo]
    done = subprocess.run(command, env=environment(request.param), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_kernel_compiles_and_copies_no_cache(compiled: dict[str, Any]) -> None:
    assert len(compiled["kernels"]) >= 11
    for name, kernel in compiled["kernels"].items():
        # Queries and outputs cut into tiles, and block tables.
        bound = 2 * kernel["tile_bytes"] + 8 * MEBI
        assert kernel["temp_bytes"] <= min(bound, kernel["kv_bytes"] / 4), (name, kernel)


def test_step_updates_its_caches_in_place(compiled: dict[str, Any]) -> None:
    step = compiled["step"]
    assert step["alias_bytes"] == step["kv_bytes"]
    assert step["temp_bytes"] <= 4 * MEBI


def test_step_of_torch_tpu_updates_its_caches_in_place(
    compiled: dict[str, Any], torch_tpu_step: dict[str, Any]
) -> None:
    step = compiled["step by torch_tpu"]
    assert step["alias_bytes"] == torch_tpu_step["stablehlo"]["kv_bytes"]
    assert step["temp_bytes"] <= 4 * MEBI


def test_four_chips_sum_twice_a_layer(compiled: dict[str, Any]) -> None:
    step = compiled.get("step on four chips")
    if step is None:
        pytest.skip("compiled for v6e alone")
    assert step["chips"] == 4
    assert step["all_reduces"] == 2 * step["layers"] and step["other_collectives"] == 0
    assert step["alias_bytes"] == step["kv_bytes"], "a quarter of the caches on each chip, in place"


def test_four_devices_decode_as_one_does(run_script: Any) -> None:
    figures = run_script("tensor_parallel.py")
    assert figures["devices"] == 4
    assert figures["tokens_equal"] and figures["distinct_tokens"] > 4
    assert figures["max_key_error"] < 1e-5 * figures["max_key"]
