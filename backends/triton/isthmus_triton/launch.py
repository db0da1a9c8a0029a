"""Launch parameters by architecture, measured and committed: nothing is tuned when an engine starts.

An architecture that has no table of its own takes :data:`FALLBACK`, whose tiles fit 64 KiB of shared
memory.  Attention parameters are keyed by the bytes of one head's row in the compute dtype, since
that is what fills shared memory: 256 is a head of 128 in a 16-bit dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLaunch:
    key_tile: int
    """Keys a program reads at once."""
    stages: int
    warps: int
    programs_per_unit: int
    """Programs in the fixed grid for each compute unit of the device."""
    least_tiles: int = 1
    """Tiles a program takes at least where a span would otherwise be cut into more than a few partial results."""
    merged: int = 16384
    """Numbers of many partial results that are merged together: 128 registers a thread of four warps of 32.
    0: one result after another, however many."""
    compiler: tuple[tuple[str, int], ...] = ()
    """Options that only this architecture's compiler knows, by name."""
    await_stores: bool = False
    """Wait for each warp's stores before a barrier, where a barrier alone does not order them for other programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLaunch:
    query_tile: int
    key_tile: int
    stages: int
    warps: int
    compiler: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorLinear:
    """How few rows times a weight are computed without the matrix library, reading the weight once."""

    out_tile: int
    in_tile: int
    warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLinear:
    """Few rows through the matrix units, the inner dimension dealt over ``splits`` programs."""

    out_tile: int
    in_tile: int
    splits: int
    stages: int
    warps: int
    await_stores: bool = False
    """As of :class:`DecodeLaunch`; matters where ``splits`` is more than 1."""
    ahead: int = 0
    """Columns of the weight that a program asks for while the kernel before it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRule:
    """Use ``launch`` for up to ``most_rows`` rows and weights within these sizes (0 is no bound)."""

    most_rows: int
    launch: VectorLinear | SplitLinear
    least_rows: int = 1
    least_out: int = 0
    most_out: int = 0
    least_in: int = 0
    most_in: int = 0

    def covers(self, rows: int, out_features: int, in_features: int) -> bool:
        return (
            self.least_rows <= rows <= self.most_rows
            and self.least_out <= out_features <= (self.most_out or out_features)
            and self.least_in <= in_features <= (self.most_in or in_features)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLaunch:
    """How a product of a mixture of experts is tiled."""

    row_tile: int
    out_tile: int
    in_tile: int
    stages: int
    warps: int
    most_pairs: float = math.inf
    """Tokens for each expert, on average, up to which this launch is taken."""


EXPERTS: Final = (
    ExpertLaunch(most_pairs=8, row_tile=16, out_tile=64, in_tile=64, stages=3, warps=4),
    ExpertLaunch(row_tile=64, out_tile=64, in_tile=64, stages=3, warps=4),
)
"""Within 64 KiB of shared memory."""
FLOAT32_EXPERTS: Final = (
    ExpertLaunch(most_pairs=8, row_tile=16, out_tile=32, in_tile=32, stages=2, warps=4),
    ExpertLaunch(row_tile=64, out_tile=32, in_tile=32, stages=2, warps=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingLaunch:
    """How a step's rows are sampled, and ``min_p`` and ``top_p`` without ``top_k`` spread over the device."""

    rounds: int = 3
    """Candidates after the first that all processors look for together."""
    round_programs: int = 528
    """Programs of a round at most; they share the slices of the rows that it has."""
    first_programs: int = 1056
    """As of the check of the first candidates, which has more rows."""
    block: int = 1024
    """Logits that a program perturbs at once."""
    wide: int = 1024
    """Logits of a greedy row that a program reads at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTable:
    decode: tuple[tuple[int, DecodeLaunch], ...]
    """(largest bytes of a head's row, parameters), ascending; the last is taken beyond it."""
    prefill: tuple[tuple[int, PrefillLaunch], ...]
    linear: tuple[LinearRule, ...] = ()
    """The first rule that covers a product is taken; the matrix library where none does."""
    experts: tuple[ExpertLaunch, ...] = EXPERTS
    """Of 16-bit dtypes, in order of their pairs; the last has no bound."""
    float32_experts: tuple[ExpertLaunch, ...] = FLOAT32_EXPERTS
    sampling: SamplingLaunch = SamplingLaunch()
    share_spans: int = 65
    """Spans from which a step looks for keys that all its short spans share, and reads those once."""
    share_tiles: int = 128
    """Tiles (times short spans) of shared keys below which each span reads them by itself."""
    choose_warps: int = 8
    """Warps that cut and draw one row's token."""
    overlap: bool = False
    """Whether a kernel may begin while the one before it ends."""
    heads_each: int = 16
    """Heads that one program rotates and stores."""

    def decode_for(self, row_bytes: int) -> DecodeLaunch:
        return _pick(self.decode, row_bytes)

    def prefill_for(self, row_bytes: int) -> PrefillLaunch:
        return _pick(self.prefill, row_bytes)

    def linear_for(self, rows: int, out_features: int, in_features: int) -> VectorLinear | SplitLinear | None:
        for rule in self.linear:
            if rule.covers(rows, out_features, in_features):
                return rule.launch
        return None

    def experts_in(self, itemsize: int) -> tuple[ExpertLaunch, ...]:
        return self.experts if itemsize == 2 else self.float32_experts


T = TypeVar("T")


def _pick(table: tuple[tuple[int, T], ...], row_bytes: int) -> T:
    return next((launch for most, launch in table if row_bytes <= most), table[-1][1])


def _split(out_tile: int, in_tile: int, splits: int, *, stages: int, ahead: int = 0) -> SplitLinear:
    return SplitLinear(out_tile=out_tile, in_tile=in_tile, splits=splits, stages=stages, warps=4, ahead=ahead)


FALLBACK: Final = LaunchTable(
    decode=(
        (256, DecodeLaunch(key_tile=32, stages=2, warps=4, programs_per_unit=2)),
        (512, DecodeLaunch(key_tile=16, stages=2, warps=4, programs_per_unit=2)),
        (1024, DecodeLaunch(key_tile=16, stages=1, warps=4, programs_per_unit=2)),
    ),
    prefill=(
        (256, PrefillLaunch(query_tile=64, key_tile=32, stages=1, warps=4)),
        (512, PrefillLaunch(query_tile=64, key_tile=16, stages=1, warps=4)),
        (1024, PrefillLaunch(query_tile=32, key_tile=16, stages=1, warps=4)),
    ),
)

TABLES: Final[dict[str, LaunchTable]] = {
    "sm_80": LaunchTable(
        decode=(
            (256, DecodeLaunch(key_tile=64, stages=3, warps=4, programs_per_unit=2)),
            (512, DecodeLaunch(key_tile=32, stages=3, warps=4, programs_per_unit=2)),
            (1024, DecodeLaunch(key_tile=16, stages=2, warps=4, programs_per_unit=2)),
        ),
        prefill=(
            (256, PrefillLaunch(query_tile=128, key_tile=64, stages=2, warps=8)),
            (512, PrefillLaunch(query_tile=64, key_tile=32, stages=2, warps=4)),
            (1024, PrefillLaunch(query_tile=32, key_tile=32, stages=1, warps=4)),
        ),
    ),
    # benchmarks/gpu_kernels.py on an H100 80GB HBM3, benchmarks/results/h100_kernels_sweep.json.
    "sm_90": LaunchTable(
        choose_warps=32,
        overlap=True,
        decode=(
            (256, DecodeLaunch(key_tile=64, stages=3, warps=4, programs_per_unit=2, least_tiles=4)),
            (512, DecodeLaunch(key_tile=32, stages=3, warps=4, programs_per_unit=2, least_tiles=4)),
            (1024, DecodeLaunch(key_tile=16, stages=2, warps=4, programs_per_unit=2, least_tiles=4)),
        ),
        prefill=(
            (256, PrefillLaunch(query_tile=128, key_tile=64, stages=3, warps=8)),
            (512, PrefillLaunch(query_tile=64, key_tile=32, stages=2, warps=4)),
            (1024, PrefillLaunch(query_tile=32, key_tile=32, stages=1, warps=4)),
        ),
        # benchmarks/gpu_experts.py on such a card.
        experts=(
            ExpertLaunch(most_pairs=8, row_tile=16, out_tile=64, in_tile=128, stages=4, warps=4),
            ExpertLaunch(most_pairs=32, row_tile=32, out_tile=64, in_tile=128, stages=3, warps=4),
            ExpertLaunch(row_tile=128, out_tile=128, in_tile=64, stages=4, warps=8),
        ),
        linear=(
            # Of one row: benchmarks/h100_steps.py on an H200, benchmarks/results/h200_one_row.json.
            LinearRule(most_rows=1, launch=VectorLinear(out_tile=4, in_tile=2048, warps=8)),
            LinearRule(most_rows=16, least_out=16384, launch=_split(64, 128, 1, stages=4, ahead=256)),
            LinearRule(most_rows=32, least_out=16384, launch=_split(128, 128, 1, stages=3, ahead=256)),
            LinearRule(most_rows=64, least_out=16384, launch=_split(128, 128, 1, stages=3)),
            LinearRule(most_rows=32, least_in=8192, launch=_split(64, 256, 2, stages=3, ahead=256)),
            LinearRule(most_rows=64, least_in=8192, launch=_split(64, 128, 2, stages=4)),
            LinearRule(most_rows=32, most_out=4096, launch=_split(64, 256, 2, stages=3, ahead=256)),
            LinearRule(most_rows=32, most_out=8192, launch=_split(64, 256, 1, stages=3, ahead=256)),
        ),
    ),
}


def launch_table(arch: str) -> LaunchTable:
    """Of an NVIDIA architecture such as ``sm_90``.  AMD's, whose barriers differ, are in ``isthmus_rocm.targets``."""
    assert not arch.startswith("gfx"), f"{arch} has no table here"
    return TABLES.get(arch, FALLBACK)
