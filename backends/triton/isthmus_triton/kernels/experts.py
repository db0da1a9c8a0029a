"""A mixture of experts by grouped products: the host never learns which expert got how many tokens.

A token's choices are pairs (token, choice), numbered ``token * top_k + choice``.  Each expert keeps a
list of its pairs, filled in any order: a pair's result does not depend on its place in the list.  The
grids are as large as any routing may need, and a program for which there is no tile ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus_triton.ahead import Launch, launching
from isthmus_triton.kernels.elementwise import activated
from isthmus_triton.kernels.overlap import await_previous, let_next_begin, overlapping
from isthmus_triton.launch import ExpertLaunch
from isthmus_triton.sizes import power_of_two, tiles_of


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits,  # [tokens, experts]
    shares,  # float32 [tokens, TOP_K]
    lists,  # int32 [experts, tokens], the pairs of each expert
    counts,  # int32 [experts], zero before
    tokens,
    experts,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    token = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    real = expert < experts
    x = tl.load(logits + token.to(tl.int64) * experts + expert, mask=real, other=float("-inf")).to(tl.float32)
    # Of logits that are not numbers as many experts are chosen as of others, and their shares are not numbers.
    least: tl.constexpr = -3.4028234663852886e38
    rank = tl.where(real, tl.where(x > least, x, least), float("-inf"))
    chosen = tl.zeros((CHOICES,), tl.int32)
    share = tl.zeros((CHOICES,), tl.float32)
    highest = tl.max(rank, 0)
    total = tl.sum(tl.exp(x - highest), 0)
    for k in tl.static_range(TOP_K):
        best, which = tl.max(rank, 0, return_indices=True)
        chosen = tl.where(choice == k, which, chosen)
        share = tl.where(choice == k, tl.exp(best - highest) / total, share)
        rank = tl.where(expert == which, float("-inf"), rank)
    if RENORMALIZE:
        share = share / tl.sum(share, 0)
    used = choice < TOP_K
    pair = token * TOP_K + choice
    tl.store(shares + pair, share, mask=used)
    place = tl.atomic_add(counts + chosen, 1, mask=used, sem="relaxed")
    tl.store(lists + chosen.to(tl.int64) * tokens + place, pair, mask=used)


@triton.jit(do_not_specialize=["tokens", "row_tiles", "row_pairs"])
def expert_linear_kernel(
    x,  # [pairs // row_pairs, in_features]
    weight,  # [experts, out_features, in_features]; GATED: [experts, 2 * out_features, in_features]
    out,  # [pairs, out_features]
    shares,  # float32 [pairs], factors of the rows of out unless GATED
    lists,  # int32 [experts, tokens]
    counts,  # int32 [experts]
    tokens,
    row_tiles,  # at least as many as the experts' pairs fill
    row_pairs,  # pairs that share a row of x
    experts,
    out_features,
    in_features,
    EXPERTS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr = 8,
    OVERLAP: tl.constexpr = False,
):
    # GROUP row tiles at a time meet every tile of their weights, so that the cache holds either.
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(out_features, OUT_TILE)
    first_tile = program // in_group * GROUP
    height = tl.minimum(row_tiles - first_tile, GROUP)
    row_tile = first_tile + program % in_group % height
    out_tile = program % in_group // height

    expert_ids = tl.arange(0, EXPERTS)
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    filled = tl.load(counts + expert_ids, mask=expert_ids < experts, other=0)
    tiles = tl.cdiv(filled, ROW_TILE)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= row_tile).to(tl.int32), 0)
    if expert < experts:
        begin = tl.sum(tl.where(expert_ids < expert, tiles, 0), 0)
        count = tl.sum(tl.where(expert_ids == expert, filled, 0), 0)
        place = (row_tile - begin) * ROW_TILE + tl.arange(0, ROW_TILE)
        row_ok = place < count
        pair = tl.load(lists + expert.to(tl.int64) * tokens + place, mask=row_ok, other=0)
        feature = out_tile * OUT_TILE + tl.arange(0, OUT_TILE)
        feature_ok = feature < out_features
        inner = tl.arange(0, IN_TILE)
        # The weight is the left operand: its rows are many enough for the widest matrix instructions.
        rows = x + (pair // row_pairs).to(tl.int64)[None, :] * in_features
        matrix = weight + expert.to(tl.int64) * out_features * in_features * (2 if GATED else 1)
        base = matrix + feature.to(tl.int64)[:, None] * in_features
        acc = tl.zeros((OUT_TILE, ROW_TILE), tl.float32)
        if GATED:
            up_base = matrix + (feature + out_features).to(tl.int64)[:, None] * in_features
            up = tl.zeros((OUT_TILE, ROW_TILE), tl.float32)
        for start in tl.range(0, in_features, IN_TILE, num_stages=STAGES):
            column = start + inner
            column_ok = column < in_features
            weight_ok = feature_ok[:, None] & column_ok[None, :]
            values = tl.load(rows + column[:, None], mask=row_ok[None, :] & column_ok[:, None], other=0.0)
            w = tl.load(base + column[None, :], mask=weight_ok, other=0.0)
            acc = tl.dot(w, values, acc, input_precision=PRECISION)
            if GATED:
                w_up = tl.load(up_base + column[None, :], mask=weight_ok, other=0.0)
                up = tl.dot(w_up, values, up, input_precision=PRECISION)
        if GATED:
            acc = activated(acc, SILU) * up
        else:
            acc *= tl.load(shares + pair, mask=row_ok, other=0.0)[None, :]
        tl.store(
            out + pair.to(tl.int64)[None, :] * out_features + feature[:, None],
            acc.to(out.dtype.element_ty),
            mask=row_ok[None, :] & feature_ok[:, None],
        )


@triton.jit
def combine_kernel(
    parts,  # [tokens, TOP_K, hidden]
    out,  # [tokens, hidden]
    hidden,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(parts + (token * TOP_K + k) * hidden + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which pairs are each expert's, known to the device alone."""

    shares: Tensor  # float32 [tokens, top_k]
    lists: Tensor  # int32 [experts, tokens]
    counts: Tensor  # int32 [experts]


def route(router_logits: Tensor, top_k: int, *, renormalize: bool, overlap: bool = False) -> Routing:
    """Softmax over ``router_logits`` [tokens, experts], contiguous, and the ``top_k`` likeliest of each token.

    A token whose logits are not numbers gets shares that are not.
    """
    tokens, experts = router_logits.shape
    assert 1 <= top_k <= experts, (top_k, experts)
    assert router_logits.is_contiguous()
    device = router_logits.device
    routing = Routing(
        torch.empty(tokens, top_k, dtype=torch.float32, device=device),
        torch.empty(experts, tokens, dtype=torch.int32, device=device),
        torch.zeros(experts, dtype=torch.int32, device=device),
    )
    launching(route_kernel, (tokens,))(
        router_logits, routing.shares, routing.lists, routing.counts, tokens, experts,
        TOP_K=top_k, CHOICES=power_of_two(top_k), EXPERTS=power_of_two(experts), RENORMALIZE=renormalize,
        OVERLAP=overlap, num_warps=1, **overlapping(overlap),
    )  # fmt: skip
    return routing


def expert_launch_for(pairs: int, experts: int, launches: Sequence[ExpertLaunch]) -> ExpertLaunch:
    """Of ``launches``, in order of :attr:`ExpertLaunch.most_pairs`; the last has no bound."""
    return next((launch for launch in launches if pairs <= launch.most_pairs * experts), launches[-1])


def row_tiles_of(pairs: int, experts: int, row_tile: int) -> int:
    """The most tiles that ``pairs`` may fill, however they are dealt to the experts."""
    filled = min(pairs, experts)
    return filled + (pairs - filled) // row_tile


def expert_linear_launch(
    x: Tensor, weight: Tensor, out: Tensor, routing: Routing, launch: ExpertLaunch, activation: str, overlap: bool
) -> Launch:
    """The launch of :func:`expert_linear`, into ``out`` [pairs, out]."""
    tokens, top_k = routing.shares.shape
    pairs, (experts, out_features, in_features) = tokens * top_k, weight.shape
    if activation:
        out_features //= 2
    row_tiles = row_tiles_of(pairs, experts, launch.row_tile)
    arguments = (
        x, weight, out, routing.shares, routing.lists, routing.counts,
        tokens, row_tiles, top_k if activation else 1, experts, out_features, in_features,
    )  # fmt: skip
    options = {
        "EXPERTS": power_of_two(experts),
        "ROW_TILE": launch.row_tile,
        "OUT_TILE": launch.out_tile,
        "IN_TILE": launch.in_tile,
        "STAGES": launch.stages,
        "GATED": activation != "",
        "SILU": activation == "silu",
        "PRECISION": "ieee",
        "OVERLAP": overlap,
        "num_warps": launch.warps,
        **overlapping(overlap),
    }
    return Launch(expert_linear_kernel, (row_tiles * tiles_of(out_features, launch.out_tile),), arguments, options)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    activation: str,
    launches: Sequence[ExpertLaunch],
    *,
    overlap: bool = False,
) -> Tensor:
    """Each pair's row times its expert's ``weight`` [experts, out, in]: [pairs, out], of contiguous tensors.

    With an ``activation``, "silu" or "gelu_tanh": a layer's first product.  ``x`` has a row for each token,
    and the weight is that of a gate [out / 2, in] and below it that of what it gates; the result is
    their gated product.  Without: its second.  ``x`` has a row for each pair, and each result is
    multiplied by the pair's share.
    """
    assert activation in ("", "silu", "gelu_tanh"), activation
    assert x.is_contiguous() and weight.is_contiguous()
    pairs = routing.shares.numel()
    experts, out_features, _ = weight.shape
    out = x.new_empty(pairs, out_features // 2 if activation else out_features)
    launch = expert_launch_for(pairs, experts, launches)
    expert_linear_launch(x, weight, out, routing, launch, activation, overlap).run()
    return out


def combine(parts: Tensor, top_k: int, *, overlap: bool = False) -> Tensor:
    """Sums over each token's choices: [tokens * top_k, hidden], contiguous, to [tokens, hidden]."""
    hidden = parts.shape[1]
    out = parts.new_empty(parts.shape[0] // top_k, hidden)
    block = min(1024, power_of_two(hidden))
    launching(combine_kernel, (out.shape[0], tiles_of(hidden, block)))(
        parts, out, hidden, TOP_K=top_k, BLOCK=block, OVERLAP=overlap, num_warps=4, **overlapping(overlap)
    )
    return out


def mix_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    activation: str,
    launches: Sequence[ExpertLaunch],
    overlap: bool = False,
) -> Tensor:
    """The ``top_k`` experts of each row of ``x`` [tokens, hidden], weighted by their shares: [tokens, hidden].

    ``gate_up`` [experts, 2 * inner, hidden], ``down`` [experts, hidden, inner].  All are contiguous and,
    but for ``router_logits`` [tokens, experts], of one dtype.  Does not synchronise: shapes alone decide
    what is launched.
    """
    assert activation in ("silu", "gelu_tanh"), activation
    if not x.shape[0]:
        return torch.empty_like(x)
    routing = route(router_logits, top_k, renormalize=renormalize, overlap=overlap)
    inner = expert_linear(x, gate_up, routing, activation, launches, overlap=overlap)
    parts = expert_linear(inner, down, routing, "", launches, overlap=overlap)
    return parts if top_k == 1 else combine(parts, top_k, overlap=overlap)
