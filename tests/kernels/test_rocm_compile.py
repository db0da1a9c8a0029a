"""Kernels compile ahead of time for every AMD target: a share of what ``make test-rocm`` compiles.

In processes of their own: this one interprets, and a compiler that gives up ends its process.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rocm_compile.py")


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=SCRIPT.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(600)
def test_a_share_of_the_kernels_compiles_for_every_target(tmp_path: Path) -> None:
    done = run(tmp_path, str(SCRIPT), "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("programs good") == 5


BAD_TABLES = """
from dataclasses import replace
import rocm_compile
from isthmus_rocm.targets import TARGETS
from isthmus_triton.launch import LaunchTable

target = TARGETS["gfx942"]
[_, decode], [_, prefill] = target.launch.decode[0], target.launch.prefill[0]
ahead = rocm_compile.AheadOfTime("gfx942", target)
ahead.install()
for bad in (
    replace(decode, key_tile=32, await_stores=False),
    replace(decode, key_tile=32, compiler=(("waves_per_eu", 8), ("matrix_instr_nonkdim", 16))),
    replace(decode, key_tile=256),
):
    table = LaunchTable(decode=((256, bad),), prefill=((256, prefill),))
    rocm_compile.attention(ahead, replace(target, launch=table), 304, rocm_compile.Shape(), ((16, 1),))
rocm_compile.on_cdna = lambda target: False
rocm_compile.products(ahead, target)
handing_over = ("decode_kernel", "split_linear_kernel")
print([result.problem for result in ahead.results if result.kernel in handing_over and not result.ok])
"""


@pytest.mark.timeout(300)
def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    """Partial results handed over too early, registers spilled, shared memory exceeded."""
    done = run(tmp_path, "-c", BAD_TABLES)
    assert done.returncode == 0, done.stderr
    early, spilled, large, *products = ast.literal_eval(done.stdout.splitlines()[-1])
    assert early == "a barrier that does not await the stores handed over after it"
    assert products == 4 * [early], "split products of two row counts in two dtypes"
    assert "registers spilled" in spilled
    assert "B of shared memory, of 65536" in large
