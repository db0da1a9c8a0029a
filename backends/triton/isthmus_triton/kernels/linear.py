"""Few rows times a weight: work that only reads the weight, where a matrix library is not at its best."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus_triton.ahead import Launch
from isthmus_triton.kernels.decode_attention import await_stores
from isthmus_triton.kernels.overlap import ask_for, await_previous, let_next_begin, overlapping
from isthmus_triton.launch import SplitLinear, VectorLinear
from isthmus_triton.sizes import power_of_two, tiles_of


@triton.jit
def vector_linear_kernel(
    x,  # [in_features]
    weight,  # [out_features, in_features]
    bias,
    out,  # [out_features]
    out_features,
    in_features,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    feature = tl.program_id(0) * OUT_TILE + tl.arange(0, OUT_TILE)
    inner = tl.arange(0, IN_TILE)
    feature_ok = feature < out_features
    base = weight + feature.to(tl.int64)[:, None] * in_features
    acc = tl.zeros((OUT_TILE, IN_TILE), tl.float32)
    if OVERLAP and EVEN:
        # The weight's first tile is on its way while the kernel before this one ends.
        w = tl.load(base + inner[None, :])
        await_previous(OVERLAP)
        let_next_begin(OVERLAP)
        values = tl.load(x + inner)
        acc += w.to(tl.float32) * values.to(tl.float32)[None, :]
        start = IN_TILE
    else:
        await_previous(OVERLAP)
        let_next_begin(OVERLAP)
        start = 0
    for begin in range(start, in_features, IN_TILE):
        column = begin + inner
        if EVEN:
            w = tl.load(base + column[None, :])
            values = tl.load(x + column)
        else:
            w = tl.load(base + column[None, :], mask=feature_ok[:, None] & (column < in_features)[None, :], other=0.0)
            values = tl.load(x + column, mask=column < in_features, other=0.0)
        acc += w.to(tl.float32) * values.to(tl.float32)[None, :]
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=feature_ok, other=0.0).to(tl.float32)
    tl.store(out + feature, result.to(out.dtype.element_ty), mask=feature_ok)


@triton.jit(do_not_specialize=["rows"])
def split_linear_kernel(
    x,  # [rows, in_features]
    weight,  # [out_features, in_features]
    bias,
    out,  # [rows, out_features]
    partial,  # float32 [splits, out tiles, OUT_TILE, ROWS]
    arrivals,  # int32 [out tiles], zero between launches
    rows,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    AWAIT_STORES: tl.constexpr = False,
    OVERLAP: tl.constexpr = False,
    AHEAD: tl.constexpr = 0,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    feature = tile * OUT_TILE + tl.arange(0, OUT_TILE)
    row = tl.arange(0, ROWS)
    inner = tl.arange(0, IN_TILE)
    feature_ok = feature < out_features
    row_ok = row < rows
    share = tl.cdiv(tl.cdiv(in_features, IN_TILE), SPLITS)
    first = split * share
    last = tl.minimum(first + share, tl.cdiv(in_features, IN_TILE))
    # The weight is the left operand: its rows are many enough for the widest matrix instructions.
    acc = tl.zeros((OUT_TILE, ROWS), tl.float32)
    base = weight + feature.to(tl.int64)[:, None] * in_features
    if OVERLAP and AHEAD > 0:
        line: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
        lines: tl.constexpr = AHEAD // line
        ahead = tl.minimum(first * IN_TILE + tl.arange(0, lines) * line, in_features - 1)
        ask_for(weight + tl.minimum(feature, out_features - 1).to(tl.int64)[:, None] * in_features + ahead[None, :])
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    for step in tl.range(first, last, num_stages=STAGES):
        column = step * IN_TILE + inner
        column_ok = column < in_features
        w = tl.load(base + column[None, :], mask=feature_ok[:, None] & column_ok[None, :], other=0.0)
        values = tl.load(
            x + row[None, :] * in_features + column[:, None], mask=row_ok[None, :] & column_ok[:, None], other=0.0
        )
        acc = tl.dot(w, values, acc, input_precision=PRECISION)
    if SPLITS > 1:
        place = tl.arange(0, OUT_TILE)[:, None] * ROWS + row[None, :]
        size: tl.constexpr = OUT_TILE * ROWS
        tiles = tl.num_programs(0)
        tl.store(partial + (split * tiles + tile).to(tl.int64) * size + place, acc)
        # Every thread's stores come before the counter's release.
        if AWAIT_STORES:
            await_stores(row)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            acc = tl.zeros((OUT_TILE, ROWS), tl.float32)
            # In order of splits, so that the sum does not depend on who arrives last.
            for other in tl.static_range(SPLITS):
                acc += tl.load(partial + (other * tiles + tile).to(tl.int64) * size + place, cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    else:
        arrived = SPLITS - 1
    if arrived == SPLITS - 1:
        if HAS_BIAS:
            acc += tl.load(bias + feature, mask=feature_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out + row[None, :] * out_features + feature[:, None],
            acc.to(out.dtype.element_ty),
            mask=row_ok[None, :] & feature_ok[:, None],
        )


class LinearScratch:
    """Partial sums of split products, shared by all of them: steps of one stream run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._partial = torch.empty(0, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(0, dtype=torch.int32, device=device)
        self._kept: list[Tensor] = []

    def reserve(self, partial: int, tiles: int) -> tuple[Tensor, Tensor]:
        """At least this many; captured graphs keep the addresses they saw, so old buffers are not freed."""
        if self._partial.numel() < partial:
            self._kept.append(self._partial)
            self._partial = torch.empty(partial, dtype=torch.float32, device=self._device)
        if self._arrivals.numel() < tiles:
            self._kept.append(self._arrivals)
            self._arrivals = torch.zeros(tiles, dtype=torch.int32, device=self._device)
        return self._partial, self._arrivals


def vector_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sizes: tuple[int, int],
    launch: VectorLinear,
    overlap: bool,
) -> Launch:
    out_features, in_features = sizes
    options = {
        "OUT_TILE": launch.out_tile,
        "IN_TILE": launch.in_tile,
        "HAS_BIAS": bias is not None,
        "EVEN": out_features % launch.out_tile == 0 and in_features % launch.in_tile == 0,
        "OVERLAP": overlap,
        "num_warps": launch.warps,
        **overlapping(overlap),
    }
    arguments = (x, weight, weight if bias is None else bias, out, out_features, in_features)
    return Launch(vector_linear_kernel, (tiles_of(out_features, launch.out_tile),), arguments, options)


def vector_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    launch: VectorLinear,
    out_dtype: torch.dtype | None = None,
    *,
    overlap: bool = False,
) -> Tensor:
    """``x @ weight.T + bias`` for one row, [1, in_features]; both contiguous."""
    out_features, in_features = weight.shape
    out = torch.empty(1, out_features, dtype=out_dtype or x.dtype, device=x.device)
    vector_launch(x, weight, bias, out, (out_features, in_features), launch, overlap).run()
    return out


def padded_rows(rows: int) -> int:
    return max(16, power_of_two(rows))


def split_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scratch: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int],
    launch: SplitLinear,
    overlap: bool,
) -> Launch:
    rows, out_features, in_features = sizes
    options = {
        "ROWS": padded_rows(rows),
        "OUT_TILE": launch.out_tile,
        "IN_TILE": launch.in_tile,
        "SPLITS": launch.splits,
        "STAGES": launch.stages,
        "HAS_BIAS": bias is not None,
        "PRECISION": "ieee",
        "AWAIT_STORES": launch.await_stores,
        "OVERLAP": overlap,
        "AHEAD": launch.ahead,
        "num_warps": launch.warps,
        **overlapping(overlap),
    }
    arguments = (x, weight, weight if bias is None else bias, out, *scratch, rows, out_features, in_features)
    grid = (tiles_of(out_features, launch.out_tile), launch.splits)
    return Launch(split_linear_kernel, grid, arguments, options)


def split_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    launch: SplitLinear,
    scratch: LinearScratch,
    out_dtype: torch.dtype | None = None,
    *,
    overlap: bool = False,
) -> Tensor:
    """``x @ weight.T + bias`` for up to a few dozen rows; both contiguous."""
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty(rows, out_features, dtype=out_dtype or x.dtype, device=x.device)
    tiles = tiles_of(out_features, launch.out_tile)
    buffers = scratch.reserve(launch.splits * tiles * launch.out_tile * padded_rows(rows), tiles)
    split_launch(x, weight, bias, out, buffers, (rows, out_features, in_features), launch, overlap).run()
    return out
