"""What the host keeps of each row's sampling, and the part of it that one step needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from isthmus.contract import Limits
from isthmus.plan import Float32Array, Int32Array, StepPlan
from isthmus.sampling_params import RowSampling

Int64Array: TypeAlias = NDArray[np.int64]
Scalar = TypeVar("Scalar", np.int32, np.float32)


@dataclass(slots=True)
class SamplingState:
    """Per-row parameters; the last row is the padding row and stays neutral (greedy).

    ``step`` is what :meth:`apply` found in the last plan, for the step that follows it.
    """

    temperature: Float32Array  # [rows] 0 is greedy
    top_k: Int32Array
    top_p: Float32Array
    min_p: Float32Array
    repetition: Float32Array
    frequency: Float32Array
    presence: Float32Array
    seed: Int64Array
    min_tokens: Int32Array
    num_prompt_tokens: Int32Array
    # Only rows that have any:
    bias: dict[int, tuple[Int32Array, Float32Array]] = field(default_factory=dict)
    allowed: dict[int, Int32Array] = field(default_factory=dict)
    stops: dict[int, Int32Array] = field(default_factory=dict)  # while min_tokens is above 0
    bad_words: dict[int, BadWords] = field(default_factory=dict)
    rows: Int32Array = field(default_factory=lambda: np.zeros(0, np.int32))  # sampled rows of the step
    positions: Int32Array = field(default_factory=lambda: np.zeros(0, np.int32))  # where their tokens will stand

    @classmethod
    def neutral(cls, limits: Limits) -> SamplingState:
        count = limits.max_rows + 1

        def zeros() -> Float32Array:
            return np.zeros(count, np.float32)

        def ones() -> Float32Array:
            return np.ones(count, np.float32)

        def integers() -> Int32Array:
            return np.zeros(count, np.int32)

        return cls(
            temperature=zeros(),
            top_k=integers(),
            top_p=ones(),
            min_p=zeros(),
            repetition=ones(),
            frequency=zeros(),
            presence=zeros(),
            seed=np.zeros(count, np.int64),
            min_tokens=integers(),
            num_prompt_tokens=integers(),
        )

    def apply(self, plan: StepPlan) -> None:
        for start in plan.starts:
            self._set(start.row, start.sampling)
            self.num_prompt_tokens[start.row] = start.num_prompt_tokens
        sampled = plan.span_samples
        self.rows = plan.span_rows[sampled]
        self.positions = plan.span_starts[sampled] + plan.span_lengths[sampled]

    def step(self, num_samples: int) -> StepRows:
        """The sampled rows of the plan last applied, padded up to ``num_samples``."""
        padding = num_samples - len(self.rows)
        rows = np.concatenate((self.rows, np.full(padding, len(self.temperature) - 1, np.int32)))
        positions = np.concatenate((self.positions, np.zeros(padding, np.int32)))
        return StepRows(state=self, rows=rows, positions=positions)

    def _set(self, row: int, sampling: RowSampling) -> None:
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.repetition[row] = sampling.repetition_penalty
        self.frequency[row] = sampling.frequency_penalty
        self.presence[row] = sampling.presence_penalty
        self.seed[row] = sampling.seed
        self.min_tokens[row] = sampling.min_tokens
        tables: tuple[dict[int, Any], ...] = (self.bias, self.allowed, self.stops, self.bad_words)
        for table in tables:
            table.pop(row, None)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            self.bias[row] = np.array(ids, np.int32), np.array(values, np.float32)
        if sampling.allowed_token_ids:
            self.allowed[row] = np.array(sampling.allowed_token_ids, np.int32)
        if sampling.min_tokens and sampling.stop_token_ids:
            self.stops[row] = np.array(sampling.stop_token_ids, np.int32)
        words = [word for word in sampling.bad_word_ids if word]
        if words:
            self.bad_words[row] = BadWords.of(words)


@dataclass(frozen=True, slots=True)
class BadWords:
    last: Int32Array  # [words] the token that would complete the word
    before: Int32Array  # [words, longest - 1] the tokens before it, right-aligned, -1 in front

    @classmethod
    def of(cls, words: list[tuple[int, ...]]) -> BadWords:
        before = np.full((len(words), max(len(word) for word in words) - 1), -1, np.int32)
        for index, word in enumerate(words):
            if len(word) > 1:
                before[index, -(len(word) - 1) :] = word[:-1]
        return cls(np.array([word[-1] for word in words], np.int32), before)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows that one step samples.  An *index* below counts these rows, not the device's."""

    state: SamplingState
    rows: Int32Array  # [samples]
    positions: Int32Array  # [samples] where the sampled token will stand

    @property
    def temperature(self) -> Float32Array:
        return self.state.temperature[self.rows]

    @property
    def num_generated(self) -> Int32Array:
        return self.positions - self.state.num_prompt_tokens[self.rows]

    @property
    def penalised(self) -> Int64Array:
        """Indices of rows with a repetition, frequency or presence penalty."""
        state, rows = self.state, self.rows
        return np.flatnonzero(
            (state.repetition[rows] != 1.0) | (state.frequency[rows] != 0.0) | (state.presence[rows] != 0.0)
        )

    @property
    def all_plain_greedy(self) -> bool:
        """Whether the likeliest token of the model's own logits is the answer for every row."""
        if self.temperature.any():
            return False
        tables: tuple[Mapping[int, object], ...] = (self.state.bias, self.state.allowed, self.state.bad_words)
        return not (len(self.penalised) or any(map(self._rows_in, tables)) or self.banned_stops()[0].size)

    def biases(self) -> tuple[Int64Array, Int32Array, Float32Array]:
        """(index, token, what to add) triples."""
        found = [(index, *self.state.bias[row]) for index, row in self._rows_in(self.state.bias)]
        return (
            _repeated([(index, len(ids)) for index, ids, _ in found]),
            _joined([ids for _, ids, _ in found], np.int32),
            _joined([values for _, _, values in found], np.float32),
        )

    def allowed(self) -> list[tuple[int, Int32Array]]:
        """(index, tokens) of rows that may only give these tokens."""
        return [(index, self.state.allowed[row]) for index, row in self._rows_in(self.state.allowed)]

    def banned_stops(self) -> tuple[Int64Array, Int32Array]:
        """(index, token) pairs that may not be sampled yet, because of ``min_tokens``."""
        early = self.num_generated < self.state.min_tokens[self.rows]
        found = [(index, self.state.stops[row]) for index, row in self._rows_in(self.state.stops) if early[index]]
        return _repeated([(index, len(ids)) for index, ids in found]), _joined([ids for _, ids in found], np.int32)

    def bad_words(self) -> tuple[Int64Array, Int32Array, Int32Array]:
        """(index, last token, tokens before it) of each bad word; see :class:`BadWords`."""
        found = [(index, self.state.bad_words[row]) for index, row in self._rows_in(self.state.bad_words)]
        width = max((words.before.shape[1] for _, words in found), default=0)
        before = [np.pad(w.before, ((0, 0), (width - w.before.shape[1], 0)), constant_values=-1) for _, w in found]
        return (
            _repeated([(index, len(words.last)) for index, words in found]),
            _joined([words.last for _, words in found], np.int32),
            np.concatenate(before) if before else np.zeros((0, 0), np.int32),
        )

    def _rows_in(self, table: Mapping[int, object]) -> list[tuple[int, int]]:
        """(index, row) of the sampled rows that the table holds."""
        if not table:
            return []
        return [(index, row) for index, row in enumerate(self.rows.tolist()) if row in table]


def _repeated(counts: list[tuple[int, int]]) -> Int64Array:
    if not counts:
        return np.zeros(0, np.int64)
    indices, times = zip(*counts, strict=True)
    return np.repeat(np.array(indices, np.int64), times)


def _joined(arrays: list[NDArray[Scalar]], dtype: type[Scalar]) -> NDArray[Scalar]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
