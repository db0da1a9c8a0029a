"""What a TPU does here, and the sizes that its steps are padded up to; imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from isthmus.contract import Capabilities, DeviceInfo, GraphScope, ShapePolicy, SpanMix
from isthmus_static.buckets import exponential

CAPABILITIES: Final = Capabilities(
    dtypes=("bfloat16", "float32"),
    kv_dtypes=("bfloat16", "float32"),
    block_sizes=(32, 16, 64, 128),
    shapes=ShapePolicy.BUCKETED,
    # Every fourth power of two, for the number of graphs: a long step does not wait for its padding's share of
    # attention, which stops at the span's end.
    token_buckets=exponential(128, 8192)[::2],
    # A step of single tokens reads all weights whatever it holds, so that fewer than eight rows gain nothing.
    span_buckets=exponential(8, 1024),
    block_buckets=exponential(16, 4096)[::2],
    span_mix=SpanMix.SINGLES_APART,
    max_long_spans=4,
    graph_scope=GraphScope.FORWARD,
    # A step is queued while the one before computes.  A third would wait for the same device.
    max_steps_in_flight=2,
    sliding_window=True,
    logit_softcap=True,
    experts=True,
    prompt_logprobs=False,
    default_max_rows=64,
    default_max_tokens=2048,
)
"""Of both routes.  The buckets go further than any engine's limits, which cut them."""


def capabilities_of(device: DeviceInfo) -> Capabilities:
    """A rehearsal on the host's processor computes in the host's memory."""
    return replace(CAPABILITIES, unified_memory=True) if device.host else CAPABILITIES
