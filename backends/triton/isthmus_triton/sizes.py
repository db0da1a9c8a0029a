"""Sizes of tiles and grids.  Triton's own functions may be called from kernels too, and take microseconds for it."""

from __future__ import annotations


def tiles_of(count: int, tile: int) -> int:
    """Tiles that hold ``count``."""
    return -(-count // tile)


def power_of_two(count: int) -> int:
    """The least that holds ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()
