"""Cuts and the draw of :mod:`isthmus.reference.cut`, by bisection instead of a sort.

A cut is a threshold on ``x`` less its row's largest: ``low`` is a bound that no kept value may reach,
``high`` one that every value above it may stay with, and each step asks for the middle.  Logits more
than :data:`WIDTH` below the largest have no probability in float32, so nothing is lost below that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from isthmus_static.noise import gumbel_noise

WIDTH: Final = 128.0
STEPS: Final = 34
"""Halvings: until the interval is below the spacing of float32 at all but the smallest distances."""


def draw(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor) -> Tensor:
    """A token for each row of ``x`` [rows, vocab], logits over temperature; int64 [rows].

    ``top_k`` int32 [rows], 0 keeps all; ``top_p`` and ``min_p`` float32 [rows]; ``keys`` int32
    [rows], see :func:`isthmus.reference.noise.row_keys`.  Traced.
    """
    below = x - x.amax(dim=-1, keepdim=True)
    floor = min_p.clamp(min=1e-38).log()[:, None]
    uncut = (min_p <= 0.0)[:, None]
    kept = torch.where(uncut, uncut, below >= floor)  # not every compiler documents an or
    kept = kept & (below > _kth(below, kept, top_k))
    kept = kept & (below > _nucleus(below, kept, top_p))
    ids = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    scores = below + gumbel_noise(keys[:, None], ids[None, :])
    return lowest_best(torch.where(kept, scores, float("-inf")))


def lowest_best(scores: Tensor) -> Tensor:
    """The lowest id among the largest of each row; int64 [rows]."""
    vocab = scores.shape[1]
    ids = torch.arange(vocab, device=scores.device)
    best = scores.amax(dim=-1, keepdim=True)
    return torch.where(scores == best, ids, vocab).amin(dim=-1).clamp(max=vocab - 1)


def _kth(below: Tensor, kept: Tensor, top_k: Tensor) -> Tensor:
    """A bound under the ``top_k``-th largest and over the next smaller one; [rows, 1]."""

    def stays(middle: Tensor) -> Tensor:
        return ((below > middle) & kept).sum(dim=-1, keepdim=True) < top_k[:, None]

    return _bisected(below, stays, (top_k <= 0)[:, None])


def _nucleus(below: Tensor, kept: Tensor, top_p: Tensor) -> Tensor:
    """A bound under the last token that belongs to the nucleus; [rows, 1]."""
    mass = torch.where(kept, torch.exp(below), 0.0)
    wanted = top_p[:, None] * mass.sum(dim=-1, keepdim=True)

    def stays(middle: Tensor) -> Tensor:
        return torch.where(below > middle, mass, 0.0).sum(dim=-1, keepdim=True) < wanted

    return _bisected(below, stays, (top_p >= 1.0)[:, None])


def _bisected(below: Tensor, stays: Callable[[Tensor], Tensor], everything: Tensor) -> Tensor:
    """The largest bound found at which ``stays`` does not hold; -inf where it always holds, and for ``everything``."""
    rows = below.shape[0]
    low = torch.full((rows, 1), -WIDTH, device=below.device)
    high = torch.zeros((rows, 1), device=below.device)
    unbounded = torch.where(everything, everything, stays(low))
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        holds = stays(middle)
        high = torch.where(holds, middle, high)
        low = torch.where(holds, low, middle)
    return torch.where(unbounded, float("-inf"), low)
