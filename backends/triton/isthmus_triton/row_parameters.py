"""What the device keeps of each row's sampling: one row of int64 words, and lists behind a pointer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.plan import Int32Array
from isthmus.sampling_params import RowSampling

# Places in a row's words; floats are their float32 bits.
FLAGS: Final = 0
TEMPERATURE: Final = 1
TOP_K: Final = 2
TOP_P: Final = 3
LOG_MIN_P: Final = 4
REPETITION: Final = 5
FREQUENCY: Final = 6
PRESENCE: Final = 7
SEED: Final = 8
MIN_TOKENS: Final = 9
EXTRAS: Final = 10
"""Address of an int32 buffer: bits of the allowed tokens, bias ids, bias values, stop ids, the last
tokens of bad words, and the tokens before those, each group only as long as the row needs."""
BIASES: Final = 11
STOPS: Final = 12
WORDS: Final = 13
WORD_LENGTH: Final = 14
WIDTH: Final = 16

# Bits of FLAGS: what the row needs done to its logits before temperature.
HAS_ALLOWED: Final = 1
HAS_LISTS: Final = 2
HAS_PENALTIES: Final = 4


@dataclass(frozen=True, slots=True)
class PackedRow:
    words: NDArray[np.int64]  # [WIDTH] with EXTRAS still 0
    extras: Int32Array  # empty where the row has no lists


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def neutral_row() -> NDArray[np.int64]:
    """Greedy, nothing changed."""
    words = np.zeros(WIDTH, np.int64)
    words[TOP_P] = words[REPETITION] = float_bits(1.0)
    words[LOG_MIN_P] = float_bits(float("-inf"))
    words[WORD_LENGTH] = 1
    return words


def pack_row(sampling: RowSampling, vocab_size: int) -> PackedRow:
    words = neutral_row()
    words[TEMPERATURE] = float_bits(sampling.temperature)
    words[TOP_K] = sampling.top_k
    words[TOP_P] = float_bits(sampling.top_p)
    if sampling.min_p > 0.0:
        words[LOG_MIN_P] = float_bits(float(np.log(np.float32(sampling.min_p))))
    words[REPETITION] = float_bits(sampling.repetition_penalty)
    words[FREQUENCY] = float_bits(sampling.frequency_penalty)
    words[PRESENCE] = float_bits(sampling.presence_penalty)
    words[SEED] = sampling.seed
    words[MIN_TOKENS] = sampling.min_tokens
    groups: list[Int32Array] = []
    flags = 0
    if sampling.allowed_token_ids:
        flags |= HAS_ALLOWED
        groups.append(allowed_bits(sampling.allowed_token_ids, vocab_size))
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias, strict=True)
        words[BIASES] = len(ids)
        groups += [np.array(ids, np.int32), np.array(values, np.float32).view(np.int32)]
    if sampling.min_tokens and sampling.stop_token_ids:
        words[STOPS] = len(sampling.stop_token_ids)
        groups.append(np.array(sampling.stop_token_ids, np.int32))
    bad_words = [word for word in sampling.bad_word_ids if word]
    if bad_words:
        words[WORDS] = len(bad_words)
        words[WORD_LENGTH] = max(len(word) for word in bad_words)
        groups += bad_word_lists(bad_words, int(words[WORD_LENGTH]))
    if words[BIASES] or words[STOPS] or words[WORDS]:
        flags |= HAS_LISTS
    if sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty:
        flags |= HAS_PENALTIES
    words[FLAGS] = flags
    return PackedRow(words, np.concatenate(groups) if groups else np.zeros(0, np.int32))


def bit_words(vocab_size: int) -> int:
    """int32 words that hold one bit a token."""
    return -(-vocab_size // 32)


def allowed_bits(tokens: tuple[int, ...], vocab_size: int) -> Int32Array:
    bits = np.zeros(bit_words(vocab_size) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def bad_word_lists(words: list[tuple[int, ...]], longest: int) -> list[Int32Array]:
    before = np.full((len(words), longest - 1), -1, np.int32)
    for index, word in enumerate(words):
        if len(word) > 1:
            before[index, -(len(word) - 1) :] = word[:-1]
    return [np.array([word[-1] for word in words], np.int32), before.ravel()]
