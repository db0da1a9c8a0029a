"""Device state that outlives a step, and a step's device inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes fixed at construction; every device buffer is allocated once, from these.

    ``num_blocks`` includes one spare block, number 0, that is never handed to a row: padded
    tokens write there.
    """

    max_rows: int
    max_tokens: int
    """Tokens a step may compute."""
    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int

    @property
    def max_blocks_per_row(self) -> int:
        return -(-self.max_model_len // self.block_size)


class StepShape(NamedTuple):
    """The counts of a step, padding included: what a captured graph is made for."""

    tokens: int
    spans: int
    samples: int
    blocks: int = 0
    """KV blocks that attention reads, in the measure of ``Capabilities.blocks_counted``; 0 where
    ``block_buckets`` is empty."""
    single: bool = False
    """Every span is of one token; not told where shapes are bucketed and spans of any lengths share one."""

    @property
    def longest_span(self) -> int:
        """Tokens that a span may have at most."""
        return 1 if self.single else self.tokens


@dataclass(slots=True, kw_only=True)
class DeviceState:
    """What each row keeps on the device while its sequence lives.

    One more row than ``max_rows``: the last is the padding row, of length 0, that padded spans
    name.  Sampling writes the token for position ``p`` to ``tokens[row, p]``, and the next step's
    input preparation reads it there, so no token has to pass through the host.
    """

    tokens: Tensor  # int32 [max_rows + 1, max_model_len + 1]
    block_tables: Tensor  # int32 [max_rows + 1, max_blocks_per_row], 0 where unset
    num_prompt_tokens: Tensor  # int32 [max_rows + 1]


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """A step as the model and the kernels see it.  Views into buffers that never move.

    The integers are the host's: exact counts in an eager step, upper bounds in a captured one.
    Cumulative offsets repeat their last value for padded spans.
    """

    token_ids: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    slots: Tensor  # int64 [tokens] block_id * block_size + offset; padding points into block 0
    span_rows: Tensor  # int32 [spans]
    query_starts: Tensor  # int32 [spans + 1] offsets into tokens
    context_lengths: Tensor  # int32 [spans] start + length: keys a span's last token sees
    block_tables: Tensor  # int32 [max_rows + 1, max_blocks_per_row], indexed by span_rows
    sample_tokens: Tensor  # int32 [samples] index into tokens of each sampled span's last token
    sample_rows: Tensor  # int32 [samples]
    num_tokens: int
    num_spans: int
    num_samples: int
    max_query_length: int
    max_context_length: int
    no_singles: bool = False
    """No span is of one token; off also where that is not known."""


@dataclass(slots=True, kw_only=True)
class Sampled:
    """What sampling leaves on the device, in buffers that never move.  See ``StepResult``."""

    tokens: Tensor  # int32 [samples]
    invalid: Tensor  # bool [samples]
    chosen_logprobs: Tensor | None = None  # float32 [samples]
    ranks: Tensor | None = None  # int32 [samples]
    top_ids: Tensor | None = None  # int32 [samples, k]
    top_logprobs: Tensor | None = None  # float32 [samples, k]

    def tensors(self) -> list[Tensor]:
        """What is to be fetched.  A backend may pack the fields into fewer tensors, and override both methods."""
        fields = (self.tokens, self.invalid, self.chosen_logprobs, self.ranks, self.top_ids, self.top_logprobs)
        return [tensor for tensor in fields if tensor is not None]

    def unpacked(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """The fields, as numpy arrays in their order, from what :meth:`tensors` became on the host."""
        return arrays
