"""Frozen settings, one record a subsystem.  Parsed once, at the edge; a function takes the values it needs.

Structs, because the server process hands them to the engine process as msgpack.
"""

from __future__ import annotations

import msgspec

from isthmus.errors import IsthmusError


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and how its numbers are kept."""

    model: str
    """A folder, a ``.gguf`` file, or a hub name."""
    revision: str | None = None
    dtype: str = "auto"
    """``"auto"`` takes the backend's preference for the checkpoint's own dtype."""
    max_model_len: int | None = None
    """Tokens a sequence may have, prompt and output; ``None`` takes the model's own limit."""
    random_weights: bool = False
    """Do not read weights: fill them at random (for measuring, never for serving)."""


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache.  Its size is ``num_blocks`` if given, else ``memory_bytes``, else a share of the device."""

    block_size: int | None = None
    """Tokens a block holds; ``None`` takes the backend's default."""
    num_blocks: int | None = None
    memory_bytes: int | None = None
    memory_fraction: float = 0.9
    """Share of the device's memory that weights, workspace and KV cache may take together."""
    kv_dtype: str = "auto"
    prefix_caching: bool = True


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on a step and on the queue; ``None`` takes the backend's proposal."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_waiting: int = 4096
    """Requests that may wait; one more is refused at once."""
    max_overtakes: int = 64
    """How many later requests may start before one that does not fit yet."""
    overlap: bool = True
    """Plan a step while the one before it runs, where the backend allows two in flight."""


class BackendOptions(msgspec.Struct, frozen=True, kw_only=True):
    device: str = "auto"
    options: dict[str, str] = {}
    """Passed to the backend's open hook; unknown names are its error."""
    graphs: bool = True
    """Capture graphs where the backend can; off runs every step eagerly."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelOptions
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    backend: BackendOptions = BackendOptions()


def require_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise IsthmusError(f"{name} is {value}; it must be more than 0")
