"""Compiling kernels on several threads before they are needed: most of a cold start is their compilation.

A compilation holds the interpreter's lock for a fifth of its time, while it reads the kernel's
source; the compiler proper and the assembler run beside each other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from isthmus_triton.identity import identify_compiler
from isthmus_triton.prepared import PreparedLaunches

MOST_THREADS: Final = 16

log = logging.getLogger(__name__)

_prepared: Final = PreparedLaunches()
_listed: Final[ContextVar[list[Launch] | None]] = ContextVar("isthmus_triton_listed", default=None)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, not made yet."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        launching(self.kernel, self.grid)(*self.arguments, **self.options)

    def compile(self, device: torch.device) -> None:
        identify_compiler()
        torch.cuda.set_device(device)  # threads begin at the first device
        compiled = self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)
        # Else the first launch compiles the host's part of it, and loads it, on the engine's own thread.
        _ = compiled.run

    def variant(self) -> tuple[Any, ...]:
        """Equal for launches that certainly share one compilation."""
        return (self.kernel, *map(_kind, self.arguments), *sorted(self.options.items()))


def _kind(argument: Any) -> Any:
    """What a compilation may depend on: alignment, and the number one."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.storage_offset() * argument.itemsize % 16
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return type(argument)


def launching(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What to call with a kernel's arguments to launch it.  Within :func:`listing` it is not launched."""
    into = _listed.get()
    if into is None:
        return _prepared.launcher(kernel, grid)
    return lambda *arguments, **options: into.append(Launch(kernel, grid, arguments, options))


@contextmanager
def listing() -> Iterator[list[Launch]]:
    """Launches that the block comes to, in place of making them: what it computes is void."""
    launches: list[Launch] = []
    token = _listed.set(launches)
    try:
        yield launches
    finally:
        _listed.reset(token)


class CompileAhead:
    """Begins to compile what it is given; :meth:`wait` before the first launch of any of it.

    Not active where kernels are interpreted, which is on the CPU: it then does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._begun: set[tuple[Any, ...]] = set()

    @property
    def active(self) -> bool:
        return self._device.type != "cpu"

    def begin(self, launches: Sequence[Launch]) -> None:
        if not self.active:
            return
        if self._pool is None:
            threads = max(2, min(MOST_THREADS, os.cpu_count() or 2))
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="isthmus-compile")
        for launch in launches:
            if (variant := launch.variant()) not in self._begun:
                self._begun.add(variant)
                self._pending.append(self._pool.submit(launch.compile, self._device))

    def wait(self) -> None:
        """One that failed is left to its launch, which compiles it again and says what is wrong."""
        if self._pool is None or _listed.get() is not None:
            return
        for pending in self._pending:
            if (error := pending.exception()) is not None:
                log.info("a kernel could not be compiled ahead: %s", error)
        self._pending.clear()
        self._pool.shutdown()
        self._pool = None
