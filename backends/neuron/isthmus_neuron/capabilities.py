"""What a NeuronCore can do, and the sizes that its steps are padded up to."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Final

from isthmus.contract import Capabilities, DeviceInfo, GraphScope, ShapePolicy, SpanMix
from isthmus_static.buckets import exponential

PARTITIONS: Final = 128
"""Rows of a NeuronCore's on-chip memory, each with lanes of its own: what the vector and matrix engines work on at
once."""
BLOCK_SIZES: Final = (32, 64, 128)


def context_blocks(block_size: int, most_tokens: int) -> tuple[int, ...]:
    """Numbers of KV blocks a row is padded up to, so that what attention gathers fills all partitions.

    A gathered key is one row of a tile, and a tile has :data:`PARTITIONS` rows.  Where ``blocks *
    block_size`` is a multiple of that, the blocks can be cut into equal pieces that fill whole tiles,
    whatever ``block_size`` is, as AWS's NxD Inference does for its paged cache (there the piece is a
    block over its "tiling factor"); else the last tile of every row idles.  So every size is a multiple
    of ``128 / gcd(128, block_size)`` blocks: of 128 tokens.

    Each size is four times the one before, from 512 tokens on: a compilation takes this compiler
    minutes, and a row reads at most four times the context that it has.
    """
    step = PARTITIONS // gcd(PARTITIONS, block_size)
    tokens = [512]
    while tokens[-1] < most_tokens:
        tokens.append(4 * tokens[-1])
    return tuple(sorted({whole_tiles(-(-count // block_size), step) for count in tokens}))


def whole_tiles(blocks: int, step: int) -> int:
    """``blocks`` rounded up to a multiple of ``step``."""
    return -(-blocks // step) * step


CAPABILITIES: Final = Capabilities(
    dtypes=("bfloat16", "float32"),
    kv_dtypes=("bfloat16", "float32"),
    block_sizes=BLOCK_SIZES,
    shapes=ShapePolicy.BUCKETED,
    # Every fourth power of two, for the number of graphs: each is a compilation of minutes.
    token_buckets=exponential(128, 8192)[::2],
    span_buckets=exponential(1, 256)[::2],
    block_buckets=context_blocks(BLOCK_SIZES[0], 131072),
    span_mix=SpanMix.SINGLES_APART,
    max_long_spans=4,
    graph_scope=GraphScope.FORWARD,
    # A step is queued while the one before computes, so the host's work hides behind the device's.  A third would
    # wait for the same device, and its tokens would come no sooner.
    max_steps_in_flight=2,
    sliding_window=True,
    logit_softcap=True,
    experts=True,
    prompt_logprobs=False,
    default_max_rows=16,
    default_max_tokens=512,
)
"""Of both routes.  The hardware has 8-bit and 16-bit floats besides; nothing here was written or tested for them."""


def capabilities_of(device: DeviceInfo) -> Capabilities:
    """A rehearsal on the host's processor computes in the host's memory."""
    return replace(CAPABILITIES, unified_memory=True) if device.host else CAPABILITIES
