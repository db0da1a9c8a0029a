"""What every Gaudi does here; imports no torch."""

from __future__ import annotations

from typing import Final

from isthmus.contract import BlockCount, Capabilities, GraphScope, ShapePolicy, SpanMix
from isthmus_static.buckets import exponential

MOST_TOKENS: Final = 16384
MOST_ROWS: Final = 1024
MOST_BLOCKS: Final = 2**18

CAPABILITIES: Final = Capabilities(
    dtypes=("bfloat16", "float32"),
    kv_dtypes=("bfloat16", "float32"),
    block_sizes=(128, 16, 32, 64),
    shapes=ShapePolicy.BUCKETED,
    token_buckets=exponential(128, MOST_TOKENS),
    span_buckets=exponential(4, MOST_ROWS),
    block_buckets=exponential(16, MOST_BLOCKS),
    blocks_counted=BlockCount.ALL_ROWS,
    span_mix=SpanMix.SINGLES_APART,
    max_long_spans=4,
    graph_scope=GraphScope.FORWARD,
    max_steps_in_flight=2,
    sliding_window=True,
    logit_softcap=True,
    experts=True,
    prompt_logprobs=False,
    default_max_rows=128,
    default_max_tokens=2048,
)
"""The buckets go further than any engine's limits, which cut them."""
