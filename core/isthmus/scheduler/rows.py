"""The running sequences as arrays indexed by row, so that a step costs a few array operations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.plan import BoolArray, Int32Array
from isthmus.scheduler.sequence import Sequence

NO_OWNER = -1


class Rows:
    """What the scheduler knows of each row.  A row without a sequence has ``serials`` -1.

    ``computed <= lengths``, ``known <= lengths``: a planned step counts as done at once, and the
    token it samples is a placeholder until the result is in.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.serials = np.full(num_rows, NO_OWNER, np.int64)
        """A number of its own for every stay of a sequence in a row: tells results of old stays apart."""
        self.sequences: NDArray[Any] = np.full(num_rows, None, object)
        self.request_ids = np.zeros(num_rows, np.int64)
        self.tokens = np.empty((num_rows, max_model_len), np.int32)  # touched, and so resident, only as far as used
        self.known = np.zeros(num_rows, np.int32)
        """Tokens whose ids are in ``tokens``."""
        self.lengths = np.zeros(num_rows, np.int32)
        """Tokens known, and placeholders after them."""
        self.computed = np.zeros(num_rows, np.int32)
        """Tokens in the KV cache once all planned steps have run."""
        self.num_prompt_tokens = np.zeros(num_rows, np.int32)
        self.max_lengths = np.zeros(num_rows, np.int32)
        self.min_stop_lengths = np.zeros(num_rows, np.int32)
        """A stop token ends a sequence that is longer than this with it."""
        self.shared_blocks = np.zeros(num_rows, np.int32)
        """Leading blocks already offered to the prefix cache."""
        self.cached = np.zeros(num_rows, np.int32)
        """Tokens taken from the prefix cache at the start."""
        self.detailed = np.zeros(num_rows, np.bool_)
        """The next output holds more than a token: it is the first, or has log-probabilities."""
        self.stops = np.full((num_rows, 1), -1, np.int32)

    def start(self, row: int, sequence: Sequence, serial: int, cached: int) -> None:
        length, sampling = len(sequence.tokens), sequence.request.sampling
        self.serials[row] = serial
        self.sequences[row] = sequence
        self.request_ids[row] = sequence.request_id
        self.tokens[row, :length] = sequence.tokens
        self.known[row] = self.lengths[row] = length
        self.computed[row] = self.cached[row] = cached
        self.num_prompt_tokens[row] = sequence.num_prompt_tokens
        self.max_lengths[row] = sequence.max_length
        self.min_stop_lengths[row] = sequence.num_prompt_tokens + sampling.min_tokens
        self.detailed[row] = not sequence.announced or sampling.num_logprobs >= 0
        extra = len(sampling.stop_token_ids) - self.stops.shape[1]
        if extra > 0:
            self.stops = np.pad(self.stops, ((0, 0), (0, extra)), constant_values=-1)
        self.stops[row] = -1
        self.stops[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids

    def clear(self, row: int) -> None:
        self.serials[row] = NO_OWNER
        self.sequences[row] = None

    def needed(self, rows: Int32Array) -> Int32Array:
        """Tokens that each row has still to compute.  The last token of all needs no computing."""
        wanted: Int32Array = np.minimum(self.lengths[rows], self.max_lengths[rows] - 1) - self.computed[rows]
        return wanted

    def append(self, rows: Int32Array, tokens: Int32Array) -> tuple[BoolArray, BoolArray]:
        """Learn each row's next token; which rows a stop token ends, and which are full."""
        places = self.known[rows]
        self.tokens[rows, places] = tokens
        lengths = places + 1
        self.known[rows] = lengths
        stopped = (self.stops[rows] == tokens[:, None]).any(axis=1) & (lengths > self.min_stop_lengths[rows])
        full: BoolArray = lengths >= self.max_lengths[rows]
        return stopped, full
