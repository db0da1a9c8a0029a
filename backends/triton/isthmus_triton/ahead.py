"""Compiling kernels on several threads before they are needed: most of a cold start is their compilation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import torch

THREADS: Final = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, not made yet."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    def compile(self, device: torch.device) -> None:
        torch.cuda.set_device(device)  # threads begin at the first device
        self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


class CompileAhead:
    """Begins to compile what it is given; :meth:`wait` before the first launch of any of it.

    Does nothing where kernels are interpreted, which is on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def begin(self, launches: Sequence[Launch]) -> None:
        if self._device.type == "cpu":
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="isthmus-compile")
        self._pending += [self._pool.submit(launch.compile, self._device) for launch in launches]

    def wait(self) -> None:
        """Raises what a compilation raised."""
        if self._pool is None:
            return
        for pending in self._pending:
            pending.result()
        self._pending.clear()
        self._pool.shutdown()
        self._pool = None
