"""What sampling parameters do to logits before temperature, in place: see ``isthmus.reference.adjust``.

One program a sampled row; a row that asks for nothing ends at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isthmus_triton.kernels.overlap import await_previous, let_next_begin
from isthmus_triton.row_parameters import (
    BIASES,
    EXTRAS,
    FLAGS,
    FREQUENCY,
    HAS_ALLOWED,
    HAS_LISTS,
    HAS_PENALTIES,
    MIN_TOKENS,
    PRESENCE,
    REPETITION,
    STOPS,
    WIDTH,
    WORD_LENGTH,
    WORDS,
)

_WIDTH = tl.constexpr(WIDTH)
_FLAGS = tl.constexpr(FLAGS)
_REPETITION = tl.constexpr(REPETITION)
_FREQUENCY = tl.constexpr(FREQUENCY)
_PRESENCE = tl.constexpr(PRESENCE)
_MIN_TOKENS = tl.constexpr(MIN_TOKENS)
_EXTRAS = tl.constexpr(EXTRAS)
_BIASES = tl.constexpr(BIASES)
_STOPS = tl.constexpr(STOPS)
_WORDS = tl.constexpr(WORDS)
_WORD_LENGTH = tl.constexpr(WORD_LENGTH)
_HAS_ALLOWED = tl.constexpr(HAS_ALLOWED)
_HAS_LISTS = tl.constexpr(HAS_LISTS)
_HAS_PENALTIES = tl.constexpr(HAS_PENALTIES)


@triton.jit
def parameter(row_parameters, row, index):
    return tl.load(row_parameters + row * _WIDTH + index)


@triton.jit
def float_parameter(row_parameters, row, index):
    return parameter(row_parameters, row, index).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_bad(values):
    """Whether a block of logits holds a NaN; comparisons with one are false."""
    return tl.max((values != values).to(tl.int32), 0)


@triton.jit
def adjust_kernel(
    logits,  # float32 [samples, vocab]
    invalid_before,  # int32 [samples]
    row_parameters,  # int64 [rows, WIDTH]
    sample_rows,
    sample_tokens,
    positions,
    tokens,  # int32 [rows, history]
    num_prompt_tokens,
    seen_bits,  # int32 [samples, words], zero between launches
    queued,  # int32 [QUEUES], zeroed here for the kernels that sample
    vocab,
    history_stride,
    bit_words,
    QUEUES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    await_previous(OVERLAP)
    let_next_begin(OVERLAP)
    sample = tl.program_id(0)
    if sample == 0:
        for place in tl.static_range(QUEUES):
            tl.store(queued + place, 0)
    row = tl.load(sample_rows + sample).to(tl.int64)
    flags = parameter(row_parameters, row, _FLAGS)
    tl.store(invalid_before + sample, 0)
    if flags != 0:
        x = logits + sample.to(tl.int64) * vocab
        lane = tl.arange(0, BLOCK)
        position = tl.load(positions + tl.load(sample_tokens + sample)) + 1
        prompt = tl.load(num_prompt_tokens + row)
        extras = parameter(row_parameters, row, _EXTRAS).to(tl.pointer_type(tl.int32))
        history = tokens + row * history_stride

        # Masks below may hide what was wrong with the model's own logits.
        bad = tl.zeros((BLOCK,), tl.int32)
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for begin in range(0, vocab, BLOCK):
            index = begin + lane
            ok = index < vocab
            values = tl.load(x + index, mask=ok, other=float("-inf"))
            bad = bad | (values != values).to(tl.int32)
            highest = tl.maximum(highest, values)
            if (flags & _HAS_ALLOWED) != 0:
                word = tl.load(extras + index // 32, mask=ok, other=0)
                kept = ((word >> (index % 32)) & 1) != 0
                tl.store(x + index, float("-inf"), mask=ok & (kept == 0))
        largest = tl.max(highest, 0)
        wrong = (tl.max(bad, 0) != 0) | (largest == float("inf")) | (largest == float("-inf"))
        tl.store(invalid_before + sample, wrong.to(tl.int32))
        if (flags & _HAS_ALLOWED) != 0:
            extras += bit_words
        tl.debug_barrier()

        if (flags & _HAS_LISTS) != 0:
            add_biases_and_bans(x, extras, history, row_parameters, row, position, prompt, BLOCK)
        if (flags & _HAS_PENALTIES) != 0:
            penalise(
                x, seen_bits + sample.to(tl.int64) * bit_words, history, row_parameters, row, position, prompt, BLOCK
            )


@triton.jit
def add_biases_and_bans(x, extras, history, row_parameters, row, position, prompt, BLOCK: tl.constexpr):
    """Logit bias, then stop tokens before ``min_tokens``, then bad words that would be completed."""
    lane = tl.arange(0, BLOCK)
    biases = parameter(row_parameters, row, _BIASES).to(tl.int32)
    stops = parameter(row_parameters, row, _STOPS).to(tl.int32)
    words = parameter(row_parameters, row, _WORDS).to(tl.int32)
    before = parameter(row_parameters, row, _WORD_LENGTH).to(tl.int32) - 1
    for begin in range(0, biases, BLOCK):
        ok = begin + lane < biases
        token = tl.load(extras + begin + lane, mask=ok, other=0)
        bias = tl.load(extras + biases + begin + lane, mask=ok, other=0).to(tl.float32, bitcast=True)
        tl.store(x + token, tl.load(x + token, mask=ok, other=0.0) + bias, mask=ok)
    extras += 2 * biases
    tl.debug_barrier()
    if position - prompt < parameter(row_parameters, row, _MIN_TOKENS):
        for begin in range(0, stops, BLOCK):
            ok = begin + lane < stops
            tl.store(x + tl.load(extras + begin + lane, mask=ok, other=0), float("-inf"), mask=ok)
    extras += stops
    for begin in range(0, words, BLOCK):
        word = begin + lane
        ok = word < words
        last = tl.load(extras + word, mask=ok, other=0)
        complete = ok
        for back in range(before):
            wanted = tl.load(extras + words + word * before + back, mask=ok, other=-1)
            place = position - before + back
            stands = tl.load(history + tl.maximum(place, 0))
            complete = complete & ((wanted < 0) | ((stands == wanted) & (place >= prompt)))
        tl.store(x + last, float("-inf"), mask=complete)
    tl.debug_barrier()


@triton.jit
def penalise(x, seen, history, row_parameters, row, position, prompt, BLOCK: tl.constexpr):
    """Repetition over prompt and output tokens, then frequency and presence over output tokens.

    ``seen`` holds a bit a token: whoever sets it first treats the token.  It is cleared after each use.
    """
    lane = tl.arange(0, BLOCK)
    repetition = float_parameter(row_parameters, row, _REPETITION)
    frequency = float_parameter(row_parameters, row, _FREQUENCY)
    presence = float_parameter(row_parameters, row, _PRESENCE)
    if repetition != 1.0:
        for begin in range(0, position, BLOCK):
            ok = begin + lane < position
            token = tl.load(history + begin + lane, mask=ok, other=0)
            old = tl.atomic_or(seen + token // 32, 1 << (token % 32), mask=ok, sem="relaxed")
            first = ok & (((old >> (token % 32)) & 1) == 0)
            value = tl.load(x + token, mask=first, other=0.0)
            tl.store(x + token, tl.where(value > 0, value / repetition, value * repetition), mask=first)
        tl.debug_barrier()
        for begin in range(0, position, BLOCK):
            ok = begin + lane < position
            token = tl.load(history + begin + lane, mask=ok, other=0)
            tl.store(seen + token // 32, 0, mask=ok)
        tl.debug_barrier()
    if (frequency != 0.0) | (presence != 0.0):
        for begin in range(prompt, position, BLOCK):
            ok = begin + lane < position
            token = tl.load(history + begin + lane, mask=ok, other=0)
            old = tl.atomic_or(seen + token // 32, 1 << (token % 32), mask=ok, sem="relaxed")
            first = ok & (((old >> (token % 32)) & 1) == 0)
            tl.atomic_add(x + token, -frequency - tl.where(first, presence, 0.0), mask=ok, sem="relaxed")
        tl.debug_barrier()
        for begin in range(prompt, position, BLOCK):
            ok = begin + lane < position
            token = tl.load(history + begin + lane, mask=ok, other=0)
            tl.store(seen + token // 32, 0, mask=ok)
