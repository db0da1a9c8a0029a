"""The fake device keeps the rules that it stands for, under each vendor's name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parents[1] / "stand_ins"
VENDORS = {
    "gaudi": ("habana_frameworks.torch", "hpu_backend"),
    "neuron": ("torch_neuronx", "neuron"),
    "tpu": ("torch_tpu", "tpu"),
}
BUILD_TIMEOUT_S = 300

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"),
    pytest.mark.timeout(BUILD_TIMEOUT_S),
]


def python(*arguments: str, vendor: str = "", **environment: str) -> str:
    """What a new interpreter prints that has the stand-ins of `vendor` on its path."""
    path = os.pathsep.join([str(STAND_INS), *([str(STAND_INS / vendor)] if vendor else [])])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_device_keeps_its_rules_under_the_name_of(vendor: str) -> None:
    """Gaudi's in lazy mode, where it has its own graphs besides."""
    module, backend = VENDORS[vendor]
    cases = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(STAND_INS / "cases.py"))
    lazy = str(int(vendor == "gaudi"))
    said = python(*cases, vendor=vendor, FAKE_DEVICE_SDK=module, FAKE_DEVICE_BACKEND=backend, PT_HPU_LAZY_MODE=lazy)
    assert " passed" in said
    assert ("skipped" in said) == (vendor != "gaudi")


@pytest.mark.parametrize(
    ("vendor", "question", "answer"),
    [
        ("gaudi", "m.device_count(), m.mem_get_info(), hasattr(m, 'wrap_in_hpu_graph')", "(0, (4096, 4096), False)"),
        ("neuron", "m.device_count(), m.get_device_properties().total_memory", "(0, 4096)"),
        ("tpu", "m", "None"),
    ],
)
def test_an_sdk_without_its_device_says_so(vendor: str, question: str, answer: str) -> None:
    module, _ = VENDORS[vendor]
    name = {"gaudi": "hpu"}.get(vendor, vendor)
    code = f"import torch, {module}; m = getattr(torch, '{name}', None); print(({question}))"
    assert python("-c", code, vendor=vendor, FAKE_DEVICE_COUNT="0", FAKE_DEVICE_MEMORY="4096").strip() == answer


@pytest.mark.slow
def test_two_processes_that_start_at_once_build_the_device_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fake_device.build"]
    environment = {**os.environ, "PYTHONPATH": str(STAND_INS), "ISTHMUS_CACHE": str(tmp_path)}
    builders = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {builder.communicate(timeout=BUILD_TIMEOUT_S)[0] for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(said) == 1
    assert sorted(path.suffix for path in (tmp_path / "fake_device").iterdir()) == ["", ".so"]
