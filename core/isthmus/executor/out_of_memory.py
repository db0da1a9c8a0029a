"""Telling a refused allocation from other errors."""

from __future__ import annotations

import torch

from isthmus.errors import OutOfMemory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused an allocation; torch's own allocator on a host has no class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    words = ("allocate memory", "not enough memory", "ran out of memory", "RESOURCE_EXHAUSTED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)
