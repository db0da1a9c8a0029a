"""TPUs on the PCI bus, as the kernel lists them in /sys: counted without a runtime, which would take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEVICES: Final = "sys/bus/pci/devices"
GOOGLE: Final = "0x1ae0"
GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Generation:
    name: str
    devices: int
    """That a chip presents to the runtime."""
    memory_bytes: int
    """Of one of them."""


GENERATIONS: Final = {
    "0x0027": Generation("TPU v2 or v3", 2, 8 * GIB),
    "0x005e": Generation("TPU v4", 1, 32 * GIB),
    "0x0062": Generation("TPU v5p", 1, 95 * GIB),
    "0x0063": Generation("TPU v5e", 1, 16 * GIB),
    "0x006f": Generation("TPU v6e", 1, 32 * GIB),
    "0x0076": Generation("TPU7x", 2, 96 * GIB),
}
"""By PCI device; from ``_internal/tpu.py`` of torch_xla 2.9 and ``_internal/utils/hardware.py`` of torch_tpu 0.2."""


def devices(root: Path = Path("/")) -> list[Generation]:
    """One entry for each device that a runtime would find, a chip's own beside each other."""
    found: list[Generation] = []
    for folder in sorted((root / DEVICES).glob("*")):
        if _text(folder / "vendor") == GOOGLE and (chip := GENERATIONS.get(_text(folder / "device"))):
            found += [chip] * chip.devices
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
