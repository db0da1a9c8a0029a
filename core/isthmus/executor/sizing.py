"""Dtypes, lengths and cache size: what was asked, what the model has, what the device allows.

Every function takes options and capabilities and raises an :class:`isthmus.errors.IsthmusError`
that says what would fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.config import CacheOptions, ModelOptions, SchedulerOptions
from isthmus.contract import Attention, Capabilities, ShapePolicy
from isthmus.errors import IsthmusError, OutOfMemory, Unsupported
from isthmus.model.spec import ModelSpec

SHORTEST_USEFUL: Final = 256
"""Tokens below which a length that nobody asked for is not lowered any further."""
SHORT_KV_DTYPES: Final = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
"""What other engines call them."""
UNIFIED_SHARE: Final = 4
"""The cache takes at most one part in this many of a host's available memory, unless asked."""
UNIFIED_TOKENS_PER_ROW: Final = 256
UNIFIED_FULL_SEQUENCES: Final = 2
"""Unless asked, a cache in the host's memory holds as many tokens as this many for each row, or this
many sequences of full length, whichever is more: what is idle in it is memory that others lack."""


def choose_dtype(asked: str, checkpoint: str, capabilities: Capabilities, backend: str) -> str:
    if asked == "auto":
        return checkpoint if checkpoint in capabilities.dtypes else capabilities.dtypes[0]
    if asked not in capabilities.dtypes:
        raise Unsupported(f"backend {backend!r} computes in {', '.join(capabilities.dtypes)}, not in {asked!r}")
    return asked


def choose_kv_dtype(asked: str, dtype: str, capabilities: Capabilities, backend: str) -> str:
    asked = SHORT_KV_DTYPES.get(asked, asked)
    if asked == "auto":
        return dtype if dtype in capabilities.kv_dtypes else capabilities.kv_dtypes[0]
    if asked not in capabilities.kv_dtypes:
        raise Unsupported(f"backend {backend!r} keeps KV in {', '.join(capabilities.kv_dtypes)}, not in {asked!r}")
    return asked


def choose_block_size(asked: int | None, capabilities: Capabilities, backend: str) -> int:
    if asked is None:
        return capabilities.block_sizes[0]
    if asked not in capabilities.block_sizes:
        sizes = ", ".join(str(size) for size in sorted(capabilities.block_sizes))
        raise Unsupported(f"block size {asked} is not one that backend {backend!r} takes; it takes {sizes}")
    return asked


def choose_max_model_len(options: ModelOptions, spec: ModelSpec) -> int:
    asked = options.max_model_len
    if asked is None:
        return spec.max_position
    if asked > spec.max_position:
        raise IsthmusError(
            f"max_model_len is {asked}, but this model's positions end at {spec.max_position}; ask for at most that"
        )
    return asked


@dataclass(frozen=True, slots=True)
class StepLimits:
    max_rows: int
    max_tokens: int
    notes: tuple[str, ...]


def choose_step_limits(options: SchedulerOptions, capabilities: Capabilities) -> StepLimits:
    """Options first, the backend's proposal where they are open, within its buckets where it has some."""
    bucketed = capabilities.shapes is ShapePolicy.BUCKETED
    notes: list[str] = []

    def within(name: str, value: int, buckets: Sequence[int]) -> int:
        if not (bucketed and buckets) or value <= max(buckets):
            return value
        notes.append(f"{name} is {max(buckets)} instead of {value}: the backend's largest bucket")
        return max(buckets)

    rows, tokens = options.max_num_seqs, options.max_num_batched_tokens
    if rows is None:
        rows = min(capabilities.default_max_rows, tokens or capabilities.default_max_rows)
    rows = within("max_num_seqs", rows, capabilities.span_buckets)
    if tokens is None:
        tokens = max(capabilities.default_max_tokens, rows)  # so that every running row moves in each step
    tokens = within("max_num_batched_tokens", tokens, capabilities.token_buckets)
    return StepLimits(rows, tokens, tuple(notes))


def check_features(spec: ModelSpec, capabilities: Capabilities, max_model_len: int, backend: str) -> None:
    """Raise :class:`Unsupported` for what the model needs and the backend does not declare."""
    widest = max(layer.attention.head_dim for layer in spec.layers)
    windows = [layer.attention.window for layer in spec.layers if 0 < layer.attention.window < max_model_len]
    if widest > capabilities.max_head_dim:
        _unsupported(backend, spec, f"heads of {widest} numbers; the most it takes is {capabilities.max_head_dim}")
    if windows and not capabilities.sliding_window:
        _unsupported(
            backend,
            spec,
            f"attention within a window of {min(windows)} tokens (not with max_model_len at most {min(windows)})",
        )
    if any(layer.attention.softcap for layer in spec.layers) and not capabilities.logit_softcap:
        _unsupported(backend, spec, "soft-capped attention scores")
    if any(layer.experts for layer in spec.layers) and not capabilities.experts:
        _unsupported(backend, spec, "a mixture of experts")


def _unsupported(backend: str, spec: ModelSpec, what: str) -> None:
    raise Unsupported(f"backend {backend!r} does not run {spec.architecture}, which needs {what}")


@dataclass(frozen=True, slots=True)
class CacheSize:
    """``num_blocks`` does not count the spare block; ``max_model_len`` is what it allows."""

    num_blocks: int
    max_model_len: int
    notes: tuple[str, ...] = ()


def bytes_per_block(spec: ModelSpec, attention: Attention, block_size: int, kv_dtype: str) -> int:
    return sum(attention.block_bytes(layer.attention, block_size, kv_dtype) for layer in spec.layers)


def device_budget(options: CacheOptions, total_bytes: int, available_bytes: int) -> int:
    """Bytes for the cache of a device with its own memory, after weights and the largest step."""
    if options.memory_bytes is not None:
        return min(options.memory_bytes, available_bytes)
    return int(options.memory_fraction * total_bytes) - (total_bytes - available_bytes)


def enough_blocks(max_rows: int, max_model_len: int, block_size: int) -> int:
    """Blocks, the spare one included, that a cache in the host's memory has unless asked for others."""
    longest = -(-max_model_len // block_size)
    a_row = min(-(-UNIFIED_TOKENS_PER_ROW // block_size), longest)
    return max(max_rows * a_row, min(UNIFIED_FULL_SEQUENCES, max_rows) * longest) + 1


def unified_budget(options: CacheOptions, available_bytes: int, enough_bytes: int) -> int:
    """Bytes for a cache in the host's memory, of which a part has to be left to others."""
    if options.memory_bytes is not None:
        return options.memory_bytes
    return min(available_bytes // UNIFIED_SHARE, enough_bytes)


def size_cache(
    options: CacheOptions, budget_bytes: int, block_bytes: int, block_size: int, max_model_len: int, *, asked: bool
) -> CacheSize:
    """Blocks that the budget holds, and the longest sequence that they hold.

    A ``max_model_len`` that was ``asked`` for and does not fit raises :class:`OutOfMemory`; the
    model's own is lowered to what fits, with a note.
    """
    if options.num_blocks is not None:
        num_blocks, source = options.num_blocks, f"num_blocks={options.num_blocks}"
    else:
        num_blocks = budget_bytes // block_bytes - 1
        source = f"{max(budget_bytes, 0) / 2**30:.2f} GiB for the KV cache"
    num_blocks = min(num_blocks, 2**31 // block_size - 2)  # slots are numbered in 32 bits on the way up
    fits = max(num_blocks, 0) * block_size
    if fits >= max_model_len:
        return CacheSize(num_blocks, max_model_len)
    needed = -(-max_model_len // block_size) * block_bytes / 2**30
    if asked or fits < SHORTEST_USEFUL:
        remedy = f"lower max_model_len to at most {fits}, or give" if fits else "give"
        raise OutOfMemory(
            f"one sequence of max_model_len {max_model_len} needs {needed:.2f} GiB of KV cache; {source} "
            f"holds {fits} tokens; {remedy} the cache more memory"
        )
    note = f"max_model_len is {fits} instead of the model's {max_model_len}: {source} holds no longer sequence"
    return CacheSize(num_blocks, fits, (note,))
