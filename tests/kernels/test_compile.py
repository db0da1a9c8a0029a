"""Every kernel compiles ahead of time for both CUDA targets, within their shared memory and without spills.

Each target's kernels compile in a process of its own: this one interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = (("sm_80", ""), ("sm_89", "over fp8e4nv"), ("sm_90", ""))
"""(architecture, what the names of its kernels contain)"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("target", "only"), TARGETS)
def test_compiles_for(target: str, only: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), target, only],
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
