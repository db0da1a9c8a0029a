"""Launches by a compiled kernel that is already known."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from triton.runtime import JITFunction

from isthmus_triton.prepared import PreparedLaunches


class Compiled:
    def __init__(self, key: Any) -> None:
        self.key = key
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid[:3], arguments))


class Kernel(JITFunction[Any]):
    """Compiles anew whenever Triton itself launches it."""

    def __init__(self) -> None:
        def source(x, y, count, scale, SIZE, STAGES=3):  # type: ignore[no-untyped-def]
            pass

        self.signature = inspect.signature(source)
        self.made: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> Compiled:
            self.made.append(Compiled((arguments, named)))
            return self.made[-1]

        return launch


def test_only_what_a_compilation_depends_on_compiles_again() -> None:
    kernel, prepared = Kernel(), PreparedLaunches()
    x, y = torch.zeros(64), torch.zeros(64)

    def launch(x: torch.Tensor, count: int = 48, scale: float = 0.5, size: int = 8, **named: Any) -> int:
        prepared.launcher(kernel, (5, 2))(x, y, count, scale, SIZE=size, **named)
        return len(kernel.made)

    assert launch(x) == 1
    assert launch(y, count=64, scale=2.0) == 1
    assert launch(x[4:]) == 1  # 16 bytes further on
    assert launch(x[1:]) == 2
    assert launch(x.half()) == 3
    assert launch(x, count=50) == 4
    assert launch(x, count=1) == 5
    assert launch(x, count=2**31) == 6
    assert launch(x, size=16) == 7
    assert launch(x, num_warps=8) == 8
    assert launch(x, count=3) == 8


def test_all_arguments_come_in_the_kernels_order_with_its_defaults() -> None:
    kernel, prepared = Kernel(), PreparedLaunches()
    x, y = torch.zeros(64), torch.zeros(64)
    for count in (50, 51):
        prepared.launcher(kernel, (7,))(x, y, count, 0.5, num_warps=4, SIZE=8)
    prepared.launcher(kernel, (7, 3))(y, x, 49, 1.5, num_warps=4, SIZE=8)
    (compiled,) = kernel.made
    assert [(grid, arguments[2:]) for grid, arguments in compiled.launched] == [
        ((7, 1, 1), (51, 0.5, 8, 3)),
        ((7, 3, 1), (49, 1.5, 8, 3)),
    ]
    assert compiled.launched[1][1][0] is y


def test_a_kernel_that_is_interpreted_is_launched_as_it_is() -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **named: (grid, arguments, named)

    assert PreparedLaunches().launcher(Interpreted(), (2,))(1, SIZE=3) == ((2,), (1,), {"SIZE": 3})
