"""What is known of each architecture, and the launch parameters for it.

No figure here was measured: no card was to be had.  Tiles, stages and warps are those that the
compiler turns into code within the target's shared memory and without spilled registers (``make
test-rocm`` compiles every one); which of those is fastest is for whoever has a card.  Sizes are from
AMD's instruction set documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from isthmus_triton.launch import EXPERTS, DecodeLaunch, LaunchTable, PrefillLaunch

KIB: Final = 1024
MOST_THREADS: Final = 1024
"""Threads of one program (a workgroup), on every architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One architecture."""

    series: str
    wavefront: int
    """Lanes that run together; a Triton "warp" here."""
    shared_bytes: int
    """Local data share that one program may take."""
    launch: LaunchTable
    max_head_dim: int = 256
    """Largest head whose tiles need no register spilled."""
    eight_bit_cache: bool = False
    """Whether it converts ``float8_e4m3fn`` by itself, and the kernels over a cache of that spill no register."""
    threads: int = MOST_THREADS


def _decode(key_tile: int, stages: int, *, warps: int = 4, await_stores: bool = False, **compiler: int) -> DecodeLaunch:
    return DecodeLaunch(
        key_tile=key_tile,
        stages=stages,
        warps=warps,
        programs_per_unit=2,
        least_tiles=4,
        merged=0,  # what it takes in registers spills some
        await_stores=await_stores,
        compiler=tuple(compiler.items()),
    )


def _cdna_decode(key_tile: int, stages: int, **compiler: int) -> DecodeLaunch:
    """A tile of few query rows, so the narrow matrix instructions; on CDNA a barrier awaits no stores."""
    return _decode(key_tile, stages, await_stores=True, waves_per_eu=1, matrix_instr_nonkdim=16, **compiler)


def _prefill(query_tile: int, key_tile: int, stages: int, warps: int, **compiler: int) -> PrefillLaunch:
    return PrefillLaunch(
        query_tile=query_tile, key_tile=key_tile, stages=stages, warps=warps, compiler=tuple(compiler.items())
    )


# Bytes of one head's row: 256 is a head of 128 in a 16-bit dtype, as in isthmus_triton.launch.
CDNA2: Final = LaunchTable(
    choose_warps=16,
    decode=(
        (256, _cdna_decode(64, 2, kpack=2)),
        (512, _cdna_decode(32, 1, kpack=1)),
    ),
    prefill=(
        (256, _prefill(128, 64, 1, 8, waves_per_eu=2, matrix_instr_nonkdim=16)),
        (512, _prefill(64, 32, 1, 4, waves_per_eu=1, matrix_instr_nonkdim=16)),
    ),
)
CDNA3: Final = CDNA2
CDNA4: Final = LaunchTable(
    choose_warps=16,
    decode=(
        (256, _cdna_decode(64, 3)),
        (512, _cdna_decode(32, 1)),
    ),
    prefill=(
        (256, _prefill(128, 64, 2, 8, waves_per_eu=2, matrix_instr_nonkdim=16)),
        (512, _prefill(64, 32, 2, 4, waves_per_eu=1, matrix_instr_nonkdim=16)),
    ),
)
RDNA3: Final = LaunchTable(
    choose_warps=32,
    decode=((256, _decode(16, 2, warps=16)),),
    prefill=((256, _prefill(64, 16, 1, 16)),),
    experts=(EXPERTS[0], replace(EXPERTS[1], warps=8)),
)
RDNA4: Final = LaunchTable(
    choose_warps=32,
    decode=(
        (256, _decode(32, 2, warps=16)),
        (512, _decode(16, 1, warps=16)),
    ),
    prefill=(
        (256, _prefill(64, 32, 1, 8)),
        (512, _prefill(32, 16, 1, 16)),
    ),
)

TARGETS: Final[dict[str, Target]] = {
    "gfx90a": Target(series="Instinct MI200", wavefront=64, shared_bytes=64 * KIB, launch=CDNA2),
    "gfx942": Target(series="Instinct MI300", wavefront=64, shared_bytes=64 * KIB, launch=CDNA3),
    "gfx950": Target(series="Instinct MI350", wavefront=64, shared_bytes=160 * KIB, launch=CDNA4),
    "gfx1100": Target(series="Radeon RX 7900", wavefront=32, shared_bytes=64 * KIB, launch=RDNA3, max_head_dim=128),
    "gfx1201": Target(series="Radeon RX 9070", wavefront=32, shared_bytes=64 * KIB, launch=RDNA4, eight_bit_cache=True),
}
