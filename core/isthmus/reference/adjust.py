"""What sampling parameters do to logits before temperature: masks, bias, bad words, penalties.

Each function changes ``logits`` [samples, vocab] in place, for the rows that ask for it alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.contract import DeviceState
from isthmus.plan import Float32Array, Int32Array
from isthmus.reference.sampling_rows import Int64Array, StepRows

NEVER = float("-inf")


def adjust(logits: Tensor, rows: StepRows, device: DeviceState) -> None:
    """In order: allowed tokens, logit bias, ``min_tokens``, bad words, penalties."""
    mask_allowed(logits, rows)
    add_bias(logits, rows)
    ban_early_stops(logits, rows)
    ban_bad_words(logits, rows, device)
    penalise(logits, rows, device)


def mask_allowed(logits: Tensor, rows: StepRows) -> None:
    for index, tokens in rows.allowed():
        ids = torch.from_numpy(tokens).long().to(logits.device)
        kept = logits[index, ids]
        logits[index] = NEVER
        logits[index, ids] = kept


def add_bias(logits: Tensor, rows: StepRows) -> None:
    index, tokens, values = rows.biases()
    if len(index):
        where = _pairs(index, tokens, logits.device)
        logits.index_put_(where, torch.from_numpy(values).to(logits.device), accumulate=True)


def ban_early_stops(logits: Tensor, rows: StepRows) -> None:
    index, tokens = rows.banned_stops()
    if len(index):
        logits[_pairs(index, tokens, logits.device)] = NEVER


def ban_bad_words(logits: Tensor, rows: StepRows, device: DeviceState) -> None:
    """Ban a bad word's last token where the tokens before it are the last ones generated.

    Prompt tokens do not count as part of a word.
    """
    index, last, before = rows.bad_words()
    if not len(index):
        return
    where = logits.device
    word_row = torch.from_numpy(rows.rows[index]).long().to(where)[:, None]
    position = torch.from_numpy(rows.positions[index]).to(where)[:, None]
    offsets = torch.arange(-before.shape[1], 0, device=where)
    places = position + offsets  # [words, longest - 1]
    wanted = torch.from_numpy(before).to(where)
    stands = device.tokens[word_row, places.clamp(min=0)] == wanted
    generated = places >= device.num_prompt_tokens[word_row]
    complete = ((wanted < 0) | (stands & generated)).all(dim=1)
    # Two words may share a last token: adding lets either ban it.
    ban = torch.zeros(len(index), device=where).masked_fill_(complete, NEVER)
    logits.index_put_(_pairs(index, last, where), ban, accumulate=True)


def penalise(logits: Tensor, rows: StepRows, device: DeviceState) -> None:
    """Repetition over prompt and output tokens, then frequency and presence over output tokens.

    A repetition penalty divides positive logits and multiplies others (Keskar et al. 2019, CTRL).
    Counts are taken afresh from the row's history, so that preemption cannot change them.
    """
    index = rows.penalised
    if not len(index):
        return
    where, state = logits.device, rows.state
    names = rows.rows[index]

    def column(values: Int32Array | Float32Array) -> Tensor:
        return torch.from_numpy(values[names]).to(where)[:, None]

    longest = int(rows.positions[index].max())
    history = device.tokens[torch.from_numpy(names).long().to(where), :longest].long()
    place = torch.arange(longest, device=where)
    known = place < torch.from_numpy(rows.positions[index]).to(where)[:, None]
    output = known & (place >= column(state.num_prompt_tokens))
    counts = torch.zeros(len(index), logits.shape[1], device=where).scatter_add_(1, history, output.float())

    # Only tokens of the history change.  Places after it stand for its first, so that all writes agree.
    ids = torch.where(known, history, history[:, :1])
    times = counts.gather(1, ids)
    at = torch.from_numpy(index).to(where)[:, None]
    chosen = logits[at, ids]
    repetition = column(state.repetition)
    chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    chosen -= column(state.frequency) * times
    chosen -= column(state.presence) * (times > 0)
    logits[at, ids] = chosen


def _pairs(index: Int64Array, tokens: Int32Array, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(index).to(device), torch.from_numpy(tokens).long().to(device)
