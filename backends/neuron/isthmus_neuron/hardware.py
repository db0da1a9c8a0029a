"""What the kernel driver says of Neuron devices, in /sys, where AWS's "Neuron Sysfs User Guide" explains it.

No runtime is started: one that starts takes its NeuronCores from every other process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEVICES: Final = "sys/devices/virtual/neuron_device"
CORE_GIB: Final = {"inferentia2": 16, "trainium1": 16, "trainium": 16}
"""Memory of one NeuronCore, by the chip's name in lower case: 32 GiB for its two, as AWS's documentation has it."""
VISIBLE_CORES: Final = "NEURON_RT_VISIBLE_CORES"
"""The runtime's: cores that a process may take, such as "0-3" or "1,4"."""
UNKNOWN_CORE_GIB: Final = 12
"""Trainium2 has 96 GiB for eight cores; no chip of this line has less for one."""


@dataclass(frozen=True, slots=True)
class Core:
    """One NeuronCore."""

    index: int  # over all devices, as VISIBLE_CORES counts
    chip: str
    folder: Path

    @property
    def total_bytes(self) -> int:
        return CORE_GIB.get(self.chip.lower(), UNKNOWN_CORE_GIB) * 2**30

    def used_bytes(self) -> int:
        """What all processes have taken: the guide's "total" counters, which tell what is in use now."""
        counters = (self.folder / "stats/memory_usage/device_mem").glob("*/total")
        return sum(int(text) for text in map(_text, counters) if text.isdigit())


def visible_cores(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> list[Core]:
    """Those that :data:`VISIBLE_CORES` leaves of all that there are."""
    allowed = environment.get(VISIBLE_CORES)
    if not allowed:
        return cores(root)
    numbers: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", allowed):
        numbers.update(range(int(first), int(last or first) + 1))
    return [core for core in cores(root) if core.index in numbers]


def cores(root: Path = Path("/")) -> list[Core]:
    """Of every device that the driver lists, in its order."""
    found: list[Core] = []
    for device in sorted((root / DEVICES).glob("neuron[0-9]*"), key=_number):
        chip = _text(device / "info/architecture/device_name") or "NeuronCore"
        folders = sorted(device.glob("neuron_core[0-9]*"), key=_number)
        found += [Core(len(found) + place, chip, folder) for place, folder in enumerate(folders)]
    return found


def _number(path: Path) -> int:
    found = re.search(r"(\d+)$", path.name)
    return int(found[1]) if found else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
