"""What crosses between a client and the engine.  msgpack with typed structs; never pickle.

Append fields only, with defaults: structs travel as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum

import msgspec
import numpy as np

from isthmus.config import EngineOptions
from isthmus.plan import Int32Array
from isthmus.sampling_params import RowSampling


class FinishReason(StrEnum):
    STOP = "stop"
    """A stop token (``stop_token`` says which), or a stop string that the client found."""
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class _Message(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    pass


class AddRequest(_Message, frozen=True, array_like=True, tag="add"):
    """One sequence to generate.  ``request_id`` is made by the client process, never by a caller."""

    request_id: int
    prompt: bytes
    """Token ids, little-endian int32; see :func:`pack_tokens`."""
    sampling: RowSampling
    priority: int = 0
    """Lower runs first."""
    cache_salt: bytes = b""
    """Prefix blocks are shared only between requests of equal salt."""
    arrival_s: float = 0.0
    """``time.monotonic()`` of the client; one machine has one such clock."""


class AbortRequests(_Message, frozen=True, array_like=True, tag="abort"):
    """Forget these; unknown or finished ids are ignored."""

    request_ids: tuple[int, ...]


class Shutdown(_Message, frozen=True, array_like=True, tag="shutdown"):
    """End the engine process; running requests are aborted."""


class Logprobs(_Message, frozen=True, array_like=True):
    """For one position: the token that stands there, then the likeliest, best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TokensOut(_Message, frozen=True, array_like=True, tag="tokens"):
    """What one step brought for one request."""

    request_id: int
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token that ended it; it is the last of ``tokens``."""
    logprobs: tuple[Logprobs, ...] = ()
    """One a token, if asked for."""
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    """Pieces in order; the first position's is ``None``.  Sent before or with the first token."""
    error: str = ""
    num_cached_tokens: int = -1
    """Prompt tokens found in the prefix cache; sent with the first output, else -1."""
    queued_s: float = 0.0
    """With the first output: seconds from arrival until first scheduled."""


class EngineStats(_Message, frozen=True, array_like=True, tag="stats"):
    """A heartbeat, sent at least each second and after each step at most every 0.1 s.

    Counters count from the engine's start.
    """

    monotonic_s: float
    """When this was made."""
    last_progress_s: float
    """When a token was last computed or the engine last had nothing to do."""
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    block_size: int = 0
    kv_waste: float = 0.0
    """Share of the slots held by running sequences that hold no token."""
    steps: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    """Tokens asked for and found in the prefix cache."""
    preemptions: int = 0
    invalid_rows: int = 0
    late_compiles: int = 0
    """Programs that a device had to compile while it served."""
    step_tokens: tuple[int, ...] = ()
    """Tokens of each step since the last heartbeat (at most 256 of them)."""


class EngineReady(_Message, frozen=True, array_like=True, tag="ready"):
    """The engine can take requests.  Limits are what it settled on, not what was asked."""

    model_name: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    backend: str
    device_name: str
    dtype: str
    providers: dict[str, str]
    notes: tuple[str, ...] = ()
    """Downgrades and proposals taken, each with its reason."""


class EngineFailed(_Message, frozen=True, array_like=True, tag="failed"):
    """The engine could not start, or ends now; ``message`` is one line for a person."""

    message: str
    kind: str = "EngineDead"
    """Name of the error class in :mod:`isthmus.errors`."""


class RequestRefused(_Message, frozen=True, array_like=True, tag="refused"):
    """An added request that was not taken: it can never fit, or the queue is full."""

    request_id: int
    message: str
    queue_full: bool = False
    param: str | None = None


class Outputs(_Message, frozen=True, array_like=True, tag="outputs"):
    """All that one step brought, in one message."""

    items: tuple[TokensOut, ...]


ToEngine = AddRequest | AbortRequests | Shutdown
FromEngine = Outputs | EngineStats | EngineReady | EngineFailed | RequestRefused


class Wire(IntEnum):
    """Bounds on what is read from a socket, and on what may lie unread at either end of it."""

    MAX_MESSAGE_BYTES = 64 * 2**20
    QUEUED_REQUESTS = 16384
    QUEUED_OUTPUTS = 1024
    """Steps.  The engine then waits for its client to read."""


def pack_tokens(tokens: Sequence[int] | Int32Array) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def unpack_tokens(packed: bytes) -> Int32Array:
    return np.frombuffer(packed, dtype="<i4").astype(np.int32, copy=False)


class EngineStart(_Message, frozen=True, array_like=True):
    """What a new engine process reads from its standard input: four bytes of length, then this.

    The pipe stays open for as long as the client lives; its end ends the engine.
    """

    options: EngineOptions
    to_engine: str
    """Address the engine listens on."""
    from_engine: str
    """Address the client listens on."""
    parent_pid: int
    progress: bool = True
    log_level: str = "INFO"
