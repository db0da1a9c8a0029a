"""What is compiled before it is needed, and how launches are listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus_triton.ahead import CompileAhead, Launch, launching, listing


class Kernel:
    """Remembers what was launched and compiled."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.compiled: list[Any] = []
        self.loaded = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        self.compiled.append((grid, arguments, options))
        if options.get("BAD"):
            raise RuntimeError("does not compile")
        return self

    @property
    def run(self) -> Any:
        """Triton builds the host's part of a launch and loads the kernel when this is first asked for."""
        self.loaded += 1
        return None


def test_launches_are_listed_and_not_made() -> None:
    kernel = Kernel()
    with listing() as launches:
        launching(kernel, (2, 3))(5, SIZE=7)
        Launch(kernel, (1,), (6,)).run()
    assert kernel.launched == []
    assert [(launch.grid, launch.arguments, launch.options) for launch in launches] == [
        ((2, 3), (5,), {"SIZE": 7}),
        ((1,), (6,), {}),
    ]
    launches[0].run()
    launching(kernel, (1,))(9)
    assert kernel.launched == [((2, 3), (5,), {"SIZE": 7}), ((1,), (9,), {})]


def test_each_variant_is_compiled_once_and_a_failure_waits_for_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernel, ahead = Kernel(), CompileAhead(torch.device("meta"))
    x = torch.empty(32, device="meta")
    ahead.begin([Launch(kernel, (1,), (x, 48), {"SIZE": size}) for size in (1, 2, 1)])
    ahead.begin([Launch(kernel, (9,), (x, 64), {"SIZE": 1}), Launch(kernel, (1,), (x, 50), {"SIZE": 1})])
    ahead.begin([Launch(kernel, (1,), (x[1:], 48), {"SIZE": 1}), Launch(kernel, (1,), (x, 48), {"BAD": True})])
    with listing():
        ahead.wait()  # nothing is launched here, so nothing is waited for
        assert ahead._pool is not None
    ahead.wait()
    assert len(kernel.compiled) == 5
    assert kernel.loaded == 4  # but for the one that does not compile
    ahead.begin([Launch(kernel, (1,), (x, 48), {"SIZE": 2})])
    ahead.wait()
    assert len(kernel.compiled) == 5


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_start_compiles_ahead_all_that_its_steps_launch(arch: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("ahead_kernels.py")), arch]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["late"] == []
    assert {"decode_kernel", "prefill_kernel", "plan_kernel", "rms_norm_kernel", "build_kernel"} <= set(found["ahead"])
