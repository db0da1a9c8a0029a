"""Which tokens stay after ``min_p``, ``top_k`` and ``top_p``, and the draw among them.

A cut is a threshold on the logits, so it does not depend on any order of equal ones; with ``x``
the logits over temperature,

- ``min_p`` keeps ``x >= max(x) + log(min_p)``;
- ``top_k`` keeps a token if fewer than ``k`` tokens have strictly larger logits;
- ``top_p`` keeps a token if the tokens with strictly larger logits have, of the mass that the cuts
  above left, less than ``p``: the smallest such set with at least ``p``, and whatever ties with its
  last token.

The draw is Gumbel-max: the largest ``x + noise`` of what stays, lowest id among equals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from isthmus.reference.noise import gumbel_noise, token_keys

CANDIDATES: Final = 256
"""Likeliest tokens looked at first: a cut that falls among them needs no sort of the vocabulary."""
MORE_CANDIDATES: Final = 8192
"""Looked at next, before the whole vocabulary."""
NOISE_AT_ONCE: Final = 2**18
"""Numbers of noise made at once for whole vocabularies, to stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class CutRows:
    """Parameters of the rows to draw for, on the device."""

    top_k: Tensor  # int64 [rows] 0 keeps all
    top_p: Tensor  # float32 [rows]
    min_p: Tensor  # float32 [rows]
    keys: Tensor  # int32 [rows] see row_keys

    def take(self, index: Tensor) -> CutRows:
        return CutRows(self.top_k[index], self.top_p[index], self.min_p[index], self.keys[index])

    @property
    def bounded(self) -> Tensor:
        """bool [rows]: rows with a ``top_k`` or ``top_p``."""
        return (self.top_k > 0) | (self.top_p < 1.0)


def draw(x: Tensor, rows: CutRows) -> Tensor:
    """A token for each row of ``x`` [rows, vocab], int64 [rows].

    The token of a row that is not finite at its largest is void.  Waits for the device to learn
    which rows need more than :data:`CANDIDATES`.
    """
    tokens = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    bounded = rows.bounded
    free = torch.nonzero(~bounded)[:, 0]
    left = torch.nonzero(bounded)[:, 0]
    for width in (CANDIDATES, MORE_CANDIDATES, x.shape[1]):
        if len(left) and width <= x.shape[1]:
            found, complete = _draw_bounded(x[left], rows.take(left), width)
            tokens[left] = found
            left = left[~complete]
    if len(free):
        tokens[free] = _draw_free(x, free, rows)
    return tokens


def _draw_bounded(x: Tensor, rows: CutRows, width: int) -> tuple[Tensor, Tensor]:
    """Draw among the ``width`` likeliest; False where the cut may keep more than these."""
    values, ids = torch.topk(x, width, dim=-1)  # largest first
    everything = width == x.shape[1]
    highest = values[:, :1]
    threshold = highest + rows.min_p.log()[:, None]

    has_kth = (rows.top_k > 0) & (rows.top_k <= width)
    kth = values.gather(1, torch.where(has_kth, rows.top_k, width)[:, None] - 1)
    threshold = torch.where(has_kth[:, None], torch.maximum(threshold, kth), threshold)
    complete = has_kth | (rows.top_k == 0) | everything

    mass = torch.exp(values - highest).masked_fill_(values < threshold, 0.0)
    total = mass.sum(dim=-1, keepdim=True)
    if bool((~has_kth & (rows.top_p < 1.0)).any()):
        # Tokens beyond the candidates have mass too.
        rest = torch.exp(x - highest).mul_(x >= threshold).sum(dim=-1, keepdim=True)
        total = torch.where(has_kth[:, None], total, rest)
    mass_above = mass.cumsum(dim=-1) - mass
    in_nucleus = (mass_above < rows.top_p[:, None] * total) & (values >= threshold)
    last = values.gather(1, in_nucleus.sum(dim=-1, keepdim=True).clamp_(min=1) - 1)
    threshold = torch.where(rows.top_p[:, None] < 1.0, torch.maximum(threshold, last), threshold)

    # What stays is all among the candidates if the last of them does not stay.
    complete &= (values[:, -1:] < threshold)[:, 0] | everything
    score = values + gumbel_noise(rows.keys[:, None], token_keys(ids.int()))
    score.masked_fill_(values < threshold, float("-inf"))
    return _lowest_best(score, ids, x.shape[1]), complete


def _draw_free(x: Tensor, index: Tensor, rows: CutRows) -> Tensor:
    """Draw among the whole vocabulary, less what ``min_p`` cuts."""
    vocabulary = token_keys(torch.arange(x.shape[1], dtype=torch.int32, device=x.device))
    cuts = bool((rows.min_p > 0.0).any())
    drawn = []
    for piece in torch.split(index, max(NOISE_AT_ONCE // x.shape[1], 1)):
        values = x[piece]
        score = gumbel_noise(rows.keys[piece][:, None], vocabulary).add_(values)
        if cuts:
            threshold = values.amax(dim=-1, keepdim=True) + rows.min_p[piece].log()[:, None]
            score.masked_fill_(values < threshold, float("-inf"))
        drawn.append(score.argmax(dim=-1))
    return torch.cat(drawn)


def _lowest_best(score: Tensor, ids: Tensor, vocab: int) -> Tensor:
    best = score.amax(dim=-1, keepdim=True)
    lowest = ids.masked_fill(score != best, vocab).amin(dim=-1)
    return lowest.clamp_(max=vocab - 1)
