"""What this machine's processor is and how much of it this process may use.  Imports no torch."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Final

CPUINFO: Final = Path("/proc/cpuinfo")
PROCESSORS: Final = Path("/sys/devices/system/cpu")


def processor_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """Instruction sets as the kernel names them; empty where it does not say."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def usable_cores() -> int:
    """Cores this process may run on, by affinity and by its control group's quota.

    Two threads of one core count once: they share its arithmetic, and would wait for each other.
    """
    try:
        processors = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = len({_core_of(processor) for processor in processors})
    quota = _quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _core_of(processor: int) -> str:
    """What names the core: the list of its threads."""
    try:
        return (PROCESSORS / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def memory_bytes() -> int:
    """0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 0


def _cpuinfo(field: str) -> str:
    try:
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""


def _quota() -> float | None:
    """Cores' worth of time that control group version 2 grants, or ``None`` where there is no limit."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / own, Path("/sys/fs/cgroup")):
            file = folder / "cpu.max"
            if file.exists():
                most, period = file.read_text().split()
                return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        pass
    return None
