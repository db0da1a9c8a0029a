"""Names of architectures, as the parts of ROCm write them, and which of them this backend knows."""

from __future__ import annotations

from typing import Final

KNOWN: Final = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
"""Those that every kernel is compiled for and that have launch parameters."""


def architecture(gcn_arch_name: str) -> str:
    """``gfx942`` from torch's ``gfx942:sramecc+:xnack-``."""
    return gcn_arch_name.partition(":")[0]


def architecture_of_version(gfx_target_version: int) -> str:
    """``gfx90a`` from the kernel driver's 90010: major, then two decimal digits each of minor and stepping."""
    major, rest = divmod(gfx_target_version, 10_000)
    minor, stepping = divmod(rest, 100)
    return f"gfx{major}{minor:x}{stepping:x}"
