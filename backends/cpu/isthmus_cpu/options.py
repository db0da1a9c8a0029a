"""What a user may set with ``--backend-option name=value``.  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from isthmus.errors import BackendError
from isthmus_cpu.machine import usable_cores


class KernelUse(StrEnum):
    AUTO = "auto"
    """Compiled kernels where they can be had, plain torch otherwise."""
    OFF = "off"
    REQUIRE = "require"
    """An error where they cannot be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOptions:
    kernels: KernelUse = KernelUse.AUTO
    threads: int = 1

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> CpuOptions:
        """Raises :class:`BackendError` for a name or value that is not known."""
        unknown = sorted(set(given) - {"kernels", "threads"})
        if unknown:
            raise BackendError(f"the cpu backend has no option {unknown[0]!r}; it has kernels and threads")
        kernels = given.get("kernels", KernelUse.AUTO)
        if kernels not in set(KernelUse):
            raise BackendError(f"option kernels is {kernels!r}; it must be one of {', '.join(KernelUse)}")
        return cls(kernels=KernelUse(kernels), threads=_threads(given.get("threads")))


def _threads(given: str | None) -> int:
    if given is None:
        return usable_cores()
    if not given.isdecimal() or not 1 <= int(given) <= 1024:
        raise BackendError(f"option threads is {given!r}; it must be a number of threads, 1 to 1024")
    return int(given)
