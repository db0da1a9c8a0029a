"""Ragged paged attention for TPUs, in Pallas: prefill, chunked prefill and decode in one kernel.

Spans of any lengths lie one after another in ``query``; each attends, causally, to its sequence's
keys, which lie in blocks of a shared cache that a block table names (paged attention: Kwon et al.,
2023, https://arxiv.org/abs/2309.06180).  The softmax is computed in one pass over the keys (online
softmax: Milakov and Gimelshein, 2018; FlashAttention: Dao et al., 2022).  That one kernel takes
spans of all lengths, driven by tables in scalar memory, is the idea of the ragged paged attention
kernels of JAX and vLLM; the tiling, the cache's layout and the code are this project's.

A span is cut into *tiles* of ``query_tile`` queries.  The grid runs over tiles in order; a tile
walks over its keys in chunks of several blocks.  While a chunk is multiplied, the next one, or the
next tile's first one, is copied from HBM into the other half of a double buffer, so that the copy
engine does not rest between short sequences.

The cache is [slots, width], slot ``block * block_size + offset``, a slot's heads side by side: a block
is one contiguous piece of whole hardware tiles, where [slots, kv_heads, head_dim] would pad a few
heads to a tile's rows and 64 lanes to 128.  ``width`` is rounded up to whole lanes, since XLA lays
other widths out transposed and would copy the whole cache before every launch.  Heads narrower than
128 lanes are computed together: queries of several heads are stacked, each with zeros in the other
heads' lanes, which costs no matrix unit time since 128 lanes are multiplied anyway.

This module imports jax; import it where a TPU's SDK is known to be there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES: Final = 128
NEVER: Final = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen.  Finite: two of them subtract to 0, where infinities give NaN."""
CHUNK_BYTES: Final = 512 * 2**10
"""Keys copied and multiplied at once, about; as many values.  VMEM holds two of each."""
SCORES: Final = 2**16
"""Scores computed at once, at most: as many float32 as the vector registers hold."""
TILE_ROWS: Final = 256
"""Rows of a long span's tile in one product: queries times the query heads that share its lanes."""
VMEM_LIMIT_BYTES: Final = 48 * 2**20
"""What the compiler may give to this kernel; v5e, v6e and tpu7x have 64 MiB of VMEM or more a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The static numbers of one launch."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    query_tile: int
    chunk_blocks: int
    scale: float
    window: int
    softcap: float

    @property
    def queries(self) -> int:
        """Query heads a key head serves."""
        return self.heads // self.kv_heads

    @property
    def packed(self) -> int:
        """Key heads in one group of lanes."""
        return max(1, LANES // self.head_dim)

    @property
    def groups(self) -> int:
        return -(-self.kv_heads // self.packed)

    @property
    def rows(self) -> int:
        """Rows of a tile in one group's product."""
        return self.packed * self.query_tile * self.queries

    @property
    def lanes(self) -> int:
        return self.packed * self.head_dim

    @property
    def width(self) -> int:
        """Numbers in a slot of the cache."""
        return self.groups * self.lanes

    @property
    def chunk(self) -> int:
        """Keys in a chunk."""
        return self.chunk_blocks * self.block_size

    def lanes_of(self, group: int) -> slice:
        return slice(group * self.lanes, (group + 1) * self.lanes)


def cache_width(kv_heads: int, head_dim: int) -> int:
    """Numbers in a slot: the heads' keys (or values) side by side, then zeros up to whole lanes."""
    return -(-kv_heads * head_dim // LANES) * LANES


def default_query_tile(heads: int, kv_heads: int, head_dim: int) -> int:
    """Queries a tile for spans of many tokens.  Steps of single tokens take 1."""
    rows_a_query = heads // kv_heads * max(1, LANES // head_dim)
    return max(8, TILE_ROWS // rows_a_query // 8 * 8)


def default_chunk_tokens(slot_bytes: int, rows: int) -> int:
    """Keys a chunk, a power of two: for keys of ``slot_bytes`` a slot and products of ``rows`` rows."""
    most = min(1024, CHUNK_BYTES // slot_bytes, SCORES // rows)
    return 1 << (max(128, most).bit_length() - 1)


def ragged_paged_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    block_tables: jax.Array,
    query_starts: jax.Array,
    context_lengths: jax.Array,
    num_spans: jax.Array,
    *,
    kv_heads: int,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    query_tile: int = 1,
    chunk_tokens: int = 0,
) -> jax.Array:
    """Causal attention of packed spans over paged keys and values: [tokens, heads, head_dim].

    ``query`` [tokens, heads, head_dim]; ``keys`` and ``values`` [slots, cache_width], all of one
    dtype, bfloat16 or float32; a slot's numbers past its heads are finite.  ``block_tables`` int32
    [spans, max_blocks], ``query_starts`` int32 [spans + 1] where each span begins in ``query`` (the
    first is 0; no gaps), ``context_lengths`` int32 [spans] keys of the span's sequence, its own
    queries included.  The first ``num_spans`` (int32 [1]) spans count, at most one a token; what the
    arrays hold past them is not used, nor is what a block table holds past the context.  Tokens past
    the last span give 0.

    The query at position ``p`` sees keys ``max(0, p - window + 1) ... p``; ``window`` 0 is all.
    Scores are scaled by ``scale``, then capped to ``softcap * tanh(scores / softcap)`` where
    ``softcap`` is not 0.  Keys not seen may hold NaN.  ``query_tile`` 1 is for steps whose spans are
    single tokens; longer spans want :func:`default_query_tile`.  Both give right results for any.

    Raises ``ValueError`` for shapes that the hardware's tiles do not fit.
    """
    tokens, heads, head_dim = query.shape
    shape = Shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        query_tile=query_tile,
        chunk_blocks=1,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    _check(shape, query, keys, values)
    chunk_tokens = chunk_tokens or default_chunk_tokens(shape.width * keys.dtype.itemsize, shape.rows)
    shape = replace(shape, chunk_blocks=min(-(-chunk_tokens // block_size), block_tables.shape[1]))
    tiles = _cut(query_starts, context_lengths, num_spans, tokens, query_tile)
    out = _launch(shape, tiles, _gather_queries(shape, query, tiles), keys, values, block_tables)
    return _scatter_outputs(shape, out, tiles)


def _check(shape: Shape, query: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    if shape.heads % shape.kv_heads:
        raise ValueError(f"{shape.heads} query heads do not divide among {shape.kv_heads} key heads")
    if shape.head_dim % LANES and LANES % shape.head_dim:
        raise ValueError(f"head_dim {shape.head_dim} neither divides {LANES} nor is a multiple of it")
    if keys.shape != values.shape or keys.shape[1] != shape.width:
        raise ValueError(f"keys {keys.shape} and values {values.shape} must both be [slots, {shape.width}]")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"query {query.dtype}, keys {keys.dtype} and values {values.dtype} must be of one dtype")
    sublanes = 32 // query.dtype.itemsize
    if shape.block_size % sublanes:
        raise ValueError(f"block_size {shape.block_size} must be a multiple of {sublanes} for {query.dtype}")


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's tiles, in the order of their tokens; those past ``count`` are idle."""

    count: jax.Array  # int32 [1]
    spans: jax.Array  # int32 [tiles]
    positions: jax.Array  # int32 [tiles] position of the tile's first query in its sequence
    lengths: jax.Array  # int32 [tiles] queries that count
    tokens: jax.Array  # int32 [tiles] index of the first query among the step's tokens
    places: jax.Array  # int32 [tokens] where a token's query is in the tiles; past them all for a padded token


def _cut(
    query_starts: jax.Array, context_lengths: jax.Array, num_spans: jax.Array, tokens: int, query_tile: int
) -> Tiles:
    spans = context_lengths.shape[0]
    live = lax.iota(jnp.int32, spans) < num_spans[0]
    starts = jnp.where(live, query_starts[:-1], tokens)
    lengths = jnp.where(live, query_starts[1:] - query_starts[:-1], 0)
    ends = jnp.cumsum(-(-lengths // query_tile), dtype=jnp.int32)  # [spans] tiles up to and with a span
    firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])

    most = min(tokens, -(-tokens // query_tile) + spans)
    tile = lax.iota(jnp.int32, most)
    span = _interval(ends, tile)
    begin = (tile - firsts[span]) * query_tile
    token = lax.iota(jnp.int32, tokens)
    token_span = _interval(starts + lengths, token)
    place = firsts[token_span] * query_tile + token - starts[token_span]
    return Tiles(
        count=ends[-1:],
        spans=span,
        positions=context_lengths[span] - lengths[span] + begin,
        lengths=jnp.clip(lengths[span] - begin, 0, query_tile),
        tokens=starts[span] + begin,
        places=jnp.where(token < jnp.sum(lengths), place, most * query_tile),
    )


def _interval(ends: jax.Array, numbers: jax.Array) -> jax.Array:
    """Which of the intervals that end before ``ends`` each number is in; the last one past them all."""
    inside = jnp.sum(ends[None, :] <= numbers[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(inside, ends.shape[0] - 1)


def _gather_queries(shape: Shape, query: jax.Array, tiles: Tiles) -> jax.Array:
    """[tiles, groups, rows, lanes]: row ``(head, query, shared)``, with zeros in other heads' lanes."""
    if shape.query_tile > 1:
        index = tiles.tokens[:, None] + lax.iota(jnp.int32, shape.query_tile)
        query = query.at[index].get(mode="clip")  # [tiles, query_tile, heads, head_dim]
    missing = shape.groups * shape.packed - shape.kv_heads
    split = query.reshape(-1, shape.query_tile, shape.kv_heads, shape.queries, shape.head_dim)
    split = jnp.pad(split, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    split = split.reshape(-1, shape.query_tile, shape.groups, shape.packed, shape.queries, shape.head_dim)
    split = split.transpose(0, 2, 3, 1, 4, 5)  # [tiles, groups, packed, query_tile, queries, head_dim]
    own = jnp.eye(shape.packed, dtype=bool)[:, None, None, :, None]
    spread = jnp.where(own, split[:, :, :, :, :, None, :], 0)
    return spread.reshape(-1, shape.groups, shape.rows, shape.lanes)


def _scatter_outputs(shape: Shape, out: jax.Array, tiles: Tiles) -> jax.Array:
    """The inverse: each head's own lanes, in the order of the tokens."""
    split = (-1, shape.groups, shape.packed, shape.query_tile, shape.queries, shape.packed, shape.head_dim)
    own = jnp.eye(shape.packed, dtype=bool)[:, None, None, :, None]
    heads = jnp.sum(jnp.where(own, out.reshape(split), 0), axis=5, dtype=out.dtype)
    heads = heads.transpose(0, 3, 1, 2, 4, 5)  # [tiles, query_tile, groups, packed, queries, head_dim]
    heads = heads.reshape(-1, shape.groups * shape.packed, shape.queries, shape.head_dim)[:, : shape.kv_heads]
    heads = heads.reshape(-1, shape.heads, shape.head_dim)
    if shape.query_tile == 1:  # a tile a token, and idle tiles give 0
        return heads
    return heads.at[tiles.places].get(mode="fill", fill_value=0)


def _launch(
    shape: Shape, tiles: Tiles, query: jax.Array, keys: jax.Array, values: jax.Array, block_tables: jax.Array
) -> jax.Array:
    tile = pl.BlockSpec((None, *query.shape[1:]), lambda index, *_: (index, 0, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    last = query.shape[0] - 1
    max_blocks = block_tables.shape[1]

    def table(ahead: int) -> pl.BlockSpec:
        # All tables together can outgrow scalar memory (1 MiB); two rows of them do not.
        def row(index: Any, count: Any, spans: Any, *_: Any) -> tuple[Any, int, int]:
            return spans[jnp.minimum(index + ahead, last)], 0, 0

        return pl.BlockSpec((None, 1, max_blocks), row, memory_space=pltpu.SMEM)

    call = pl.pallas_call(
        functools.partial(_kernel, shape=shape),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(query.shape[0],),
            in_specs=[table(0), table(1), tile, anywhere, anywhere],
            out_specs=tile,
            scratch_shapes=[
                pltpu.VMEM((2, shape.chunk, shape.width), keys.dtype),
                pltpu.VMEM((2, shape.chunk, shape.width), values.dtype),
                pltpu.VMEM((shape.groups, shape.rows, LANES), jnp.float32),
                pltpu.VMEM((shape.groups, shape.rows, LANES), jnp.float32),
                pltpu.VMEM((shape.groups, shape.rows, shape.lanes), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        # A tile begins the copies of the next one, so tiles run in order on one core.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES),
        name="isthmus_ragged_paged_attention",
    )
    tables = block_tables[:, None, :]
    out: jax.Array = call(tiles.count, tiles.spans, tiles.positions, tiles.lengths, tables, tables, query, keys, values)
    return out


def _kernel(
    count: Any,  # SMEM int32 [1]
    spans: Any,  # SMEM int32 [tiles]
    positions: Any,  # SMEM int32 [tiles]
    lengths: Any,  # SMEM int32 [tiles]
    table: Any,  # SMEM int32 [1, max_blocks] this tile's
    next_table: Any,  # SMEM int32 [1, max_blocks] the next tile's
    query: Any,  # VMEM [groups, rows, lanes] this tile's
    keys: Any,  # HBM [slots, width]
    values: Any,  # HBM [slots, width]
    out: Any,  # VMEM [groups, rows, lanes] this tile's
    key_halves: Any,  # VMEM [2, chunk, width]
    value_halves: Any,  # VMEM [2, chunk, width]
    maxima: Any,  # VMEM float32 [groups, rows, LANES] largest score so far, the same in all lanes
    sums: Any,  # VMEM float32 [groups, rows, LANES] sum of exp(score - maximum)
    weighted: Any,  # VMEM float32 [groups, rows, lanes] sum of exp(score - maximum) * value
    half: Any,  # SMEM int32 [1] the half that holds this tile's first chunk
    semaphores: Any,  # DMA [2, 2] by half; keys and values
    *,
    shape: Shape,
) -> None:
    tile = pl.program_id(0)
    size = shape.block_size

    def key_range(tile: Any) -> tuple[Any, Any]:
        """Positions that some query of the tile sees."""
        begin = jnp.maximum(positions[tile] - shape.window + 1, 0) if shape.window else jnp.int32(0)
        return begin, positions[tile] + lengths[tile]

    def chunk_range(tile: Any) -> tuple[Any, Any]:
        begin, end = key_range(tile)
        return lax.div(begin, shape.chunk), _blocks(end, shape.chunk)

    def copies(tile: Any, blocks: Any, chunk: Any, into: Any, act: Any) -> None:
        """``act`` on the copy of each block of the chunk that the tile needs."""
        begin, end = key_range(tile)
        first = chunk * shape.chunk_blocks

        def block(index: Any, carry: None) -> None:
            source = pl.ds(pl.multiple_of(blocks[0, index] * size, size), size)
            target = pl.ds(pl.multiple_of((index - first) * size, size), size)
            act(pltpu.make_async_copy(keys.at[source], key_halves.at[into, target], semaphores.at[into, 0]))
            act(pltpu.make_async_copy(values.at[source], value_halves.at[into, target], semaphores.at[into, 1]))

        low = jnp.maximum(lax.div(begin, size), first)
        high = jnp.minimum(_blocks(end, size), first + shape.chunk_blocks)
        lax.fori_loop(low, high, block, None)

    def start(tile: Any, blocks: Any, chunk: Any, into: Any) -> None:
        copies(tile, blocks, chunk, into, lambda copy: copy.start())

    def attend(chunk: Any, now: Any) -> None:
        begin, end = key_range(tile)
        first = chunk * shape.chunk

        # What was not copied is whatever lay there, and NaN times 0 is not 0.
        @pl.when((first < begin) | (first + shape.chunk > end))
        def _() -> None:
            key = first + lax.broadcasted_iota(jnp.int32, (shape.chunk, 1), 0)
            held = value_halves[now]
            value_halves[now] = jnp.where((key >= begin) & (key < end), held, jnp.zeros_like(held))

        row = lax.broadcasted_iota(jnp.int32, (shape.rows, shape.chunk), 0)
        # Rows past the tile's queries do as its last one does; they are dropped.
        at = positions[tile] + jnp.minimum(lax.rem(lax.div(row, shape.queries), shape.query_tile), lengths[tile] - 1)
        key = first + lax.broadcasted_iota(jnp.int32, (shape.rows, shape.chunk), 1)
        seen = key <= at
        if shape.window:
            seen &= key > at - shape.window
        for group in range(shape.groups):
            _attend_group(
                shape, seen, query[group], key_halves[now, :, shape.lanes_of(group)],
                value_halves[now, :, shape.lanes_of(group)], maxima.at[group], sums.at[group], weighted.at[group],
            )  # fmt: skip

    @pl.when(tile == 0)
    def _() -> None:
        half[0] = 0

        @pl.when(count[0] > 0)
        def _() -> None:
            start(0, table, chunk_range(0)[0], 0)

    @pl.when(tile >= count[0])
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(tile < count[0])
    def _() -> None:
        maxima[...] = jnp.full_like(maxima, NEVER)
        sums[...] = jnp.zeros_like(sums)
        weighted[...] = jnp.zeros_like(weighted)
        first, end = chunk_range(tile)
        base = half[0]

        def walk(chunk: Any, carry: None) -> None:
            now = lax.rem(base + chunk - first, 2)

            @pl.when(chunk + 1 < end)
            def _() -> None:
                start(tile, table, chunk + 1, 1 - now)

            @pl.when((chunk + 1 == end) & (tile + 1 < count[0]))
            def _() -> None:
                start(tile + 1, next_table, chunk_range(tile + 1)[0], 1 - now)

            copies(tile, table, chunk, now, lambda copy: copy.wait())
            attend(chunk, now)

        lax.fori_loop(first, end, walk, None)
        half[0] = lax.rem(base + end - first, 2)
        out[...] = (weighted[...] / sums[:, :, :1]).astype(out.dtype)


def _blocks(keys: Any, size: int) -> Any:
    """Blocks of ``size`` that hold ``keys``.  Not ``//``, whose sign rules ask which chip this is for."""
    return lax.div(keys + size - 1, size)


def _attend_group(
    shape: Shape, seen: Any, query: Any, keys: Any, values: Any, maxima: Any, sums: Any, weighted: Any
) -> None:
    """One chunk of keys and values [chunk, lanes] for one group's rows [rows, lanes]."""
    # The default would multiply float32 in bfloat16.
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    scores = dot(query, keys, (((1,), (1,)), ((), ()))) * shape.scale  # [rows, chunk]
    if shape.softcap:
        scores = shape.softcap * jnp.tanh(scores / shape.softcap)
    scores = jnp.where(seen, scores, NEVER)

    before = maxima[...]
    maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - maximum[:, :1])
    fade = jnp.exp(before - maximum)
    maxima[...] = maximum
    sums[...] = fade * sums[...] + jnp.sum(weights, axis=1, keepdims=True)
    product = dot(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
    weighted[...] = weighted[...] * fade[:, :1] + product
