"""What a backend says of itself before anything is built.  Frozen data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ShapePolicy(StrEnum):
    EXACT = "exact"
    """Any number of tokens and spans up to the limits."""
    BUCKETED = "bucketed"
    """A step is padded up to a size in ``token_buckets``, ``span_buckets`` and ``block_buckets``, and where
    graphs are captured there is one for every combination, so that no step runs without."""


class GraphScope(StrEnum):
    """How much of a step one captured graph may hold."""

    NONE = "none"
    FORWARD = "forward"
    """The model's forward, from the inputs' preparation to logits; with ``graph_any_size`` from prepared inputs to
    hidden states."""
    STEP = "step"
    """Input preparation, forward and sampling: the whole device side of a step."""


class SpanMix(StrEnum):
    """Which spans may share a batch."""

    ANY = "any"
    SINGLES_APART = "singles_apart"
    """Spans of one token, or longer ones of any lengths: a step holds one kind."""


class BlockCount(StrEnum):
    """What ``block_buckets`` count: the KV blocks that a step's attention reads."""

    LONGEST_ROW = "longest_row"
    """Blocks of the row that has the most of them."""
    ALL_ROWS = "all_rows"
    """Blocks of all rows of the step together; a block that two rows share counts twice.  Steps of long spans,
    where those are apart, count the blocks of their longest row all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """One device that a plugin sees.  ``memory_bytes`` is 0 where it is not known cheaply."""

    backend: str
    index: int
    name: str
    memory_bytes: int = 0
    details: tuple[tuple[str, str], ...] = ()
    host: bool = False
    """The machine's own processor and memory: ``auto`` takes it only where it finds nothing else."""
    auto: bool = True
    """Whether ``auto`` may take it; off for a device that has to be asked for by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Everything the planner and the executor need to know of a device.

    The core asks ``capabilities.x`` and never which vendor this is.
    """

    dtypes: tuple[str, ...] = ("float32",)
    """Weight and compute dtypes, the preferred one for a checkpoint's own dtype first."""
    kv_dtypes: tuple[str, ...] = ("float32",)
    block_sizes: tuple[int, ...] = (16,)
    """Tokens a KV block may hold; the first is the default."""
    max_head_dim: int = 256
    shapes: ShapePolicy = ShapePolicy.EXACT
    token_buckets: tuple[int, ...] = ()
    span_buckets: tuple[int, ...] = ()
    block_buckets: tuple[int, ...] = ()
    """Empty: a step's shape does not depend on how many KV blocks it reads."""
    blocks_counted: BlockCount = BlockCount.LONGEST_ROW
    span_mix: SpanMix = SpanMix.ANY
    max_long_spans: int = 0
    """With ``singles_apart``: spans in a step of longer ones at most; 0 for no bound."""
    graph_scope: GraphScope = GraphScope.NONE
    graph_any_size: bool = False
    """One captured graph serves every number of tokens up to the captured one."""
    mixed_graph_tokens: tuple[int, ...] = ()
    """With ``exact`` shapes and a graph for each size: numbers of tokens, ascending, for which steps are captured
    that hold spans of any lengths, beside those of decode steps.  Such a step takes the next larger one."""
    max_steps_in_flight: int = 1
    """How many steps may be submitted before the first is collected."""
    sliding_window: bool = False
    logit_softcap: bool = False
    experts: bool = False
    logprobs: bool = True
    """Log-probabilities of sampled tokens can be had."""
    prompt_logprobs: bool = True
    """Those of a prompt's tokens can be had."""
    unified_memory: bool = False
    """The KV cache is taken from host memory: sized in bytes, not as a share of the device."""
    default_max_rows: int = 64
    """Sequences that run at once where the options leave it open; the backend's proposal."""
    default_max_tokens: int = 2048
    """Tokens a step computes at most where the options leave it open; the backend's proposal."""
