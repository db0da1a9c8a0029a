"""A small Llama-like decode step in jax around the Pallas kernel: what the TPU compiler is given to prove.

Tensor parallel over a mesh axis: heads and the inner dimension are split, and each layer sums twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from isthmus_tpu.kernels.ragged_paged_attention import cache_width, ragged_paged_attention

Tree = Any


@dataclass(frozen=True, kw_only=True)
class Model:
    layers: int = 2
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 128
    inner: int = 512
    vocab: int = 1024
    block_size: int = 16
    num_blocks: int = 64
    rows: int = 4
    max_blocks: int = 8
    dtype: str = "bfloat16"

    @property
    def kv_bytes(self) -> int:
        slot = cache_width(self.kv_heads, self.head_dim) * jnp.dtype(self.dtype).itemsize
        return 2 * self.layers * self.num_blocks * self.block_size * slot


AXIS = "tp"
WEIGHTS = {
    "query": P(None, AXIS),
    "key": P(None, AXIS),
    "value": P(None, AXIS),
    "out": P(AXIS, None),
    "gate": P(None, AXIS),
    "up": P(None, AXIS),
    "down": P(AXIS, None),
}
CACHE = P(None, AXIS)


def shapes(model: Model) -> tuple[Tree, Tree, Tree]:
    """Weights, caches and inputs as (shape, dtype name, how it is split)."""
    kv = model.kv_heads * model.head_dim
    sizes = {
        "query": (model.hidden, model.heads * model.head_dim),
        "key": (model.hidden, kv),
        "value": (model.hidden, kv),
        "out": (model.heads * model.head_dim, model.hidden),
        "gate": (model.hidden, model.inner),
        "up": (model.hidden, model.inner),
        "down": (model.inner, model.hidden),
    }
    layer = {name: (sizes[name], model.dtype, split) for name, split in WEIGHTS.items()}
    weights = {"layers": [layer] * model.layers, "embedding": ((model.vocab, model.hidden), model.dtype, P())}
    slots = model.num_blocks * model.block_size
    half = ((slots, cache_width(model.kv_heads, model.head_dim)), model.dtype, CACHE)
    caches = [[half, half]] * model.layers
    rows = ((model.rows,), "int32", P())
    inputs = [rows, rows, rows, ((model.rows, model.max_blocks), "int32", P()), ((1,), "int32", P())]
    return weights, caches, inputs


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 3 and isinstance(node[1], str)


def norm(x: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * lax.rsqrt(square + 1e-5)).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def kernel(
    model: Model, kv_heads: int, query: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array,
    positions: jax.Array, num_spans: jax.Array,
) -> jax.Array:  # fmt: skip
    """The Pallas kernel over a step of single tokens."""
    return ragged_paged_attention(
        query, keys, values, tables, lax.iota(jnp.int32, model.rows + 1), positions + 1, num_spans,
        kv_heads=kv_heads, block_size=model.block_size, scale=model.head_dim**-0.5,
    )  # fmt: skip


def gather(
    model: Model, kv_heads: int, query: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array,
    positions: jax.Array, num_spans: jax.Array,
) -> jax.Array:  # fmt: skip
    """The same in plain jax, where several CPU devices have to run it: interpreted kernels wait for each other."""
    slots = (tables[:, :, None] * model.block_size + lax.iota(jnp.int32, model.block_size)).reshape(model.rows, -1)
    key, value = (cache[slots].reshape(*slots.shape, kv_heads, model.head_dim) for cache in (keys, values))
    grouped = query.reshape(model.rows, kv_heads, -1, model.head_dim)
    scores = jnp.einsum("bhgd,bkhd->bhgk", grouped, key) * model.head_dim**-0.5
    seen = lax.iota(jnp.int32, slots.shape[1])[None] <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhgk,bkhd->bhgd", weights, value).reshape(query.shape)


def step(
    model: Model,
    axis: str | None,
    attend: Any,
    weights: Tree,
    caches: Tree,
    tokens: jax.Array,  # int32 [rows]
    positions: jax.Array,  # int32 [rows]
    slots: jax.Array,  # int32 [rows]
    tables: jax.Array,  # int32 [rows, max_blocks]
    num_spans: jax.Array,  # int32 [1]
) -> tuple[jax.Array, Tree]:
    """The next token of each row, and the caches with this one's keys and values."""
    parts = lax.axis_size(axis) if axis else 1
    kv_heads, dim = model.kv_heads // parts, model.head_dim
    total = functools.partial(lax.psum, axis_name=axis) if axis else lambda x: x
    x, written = weights["embedding"][tokens], []
    for layer, (keys, values) in zip(weights["layers"], caches, strict=True):
        hidden = norm(x)
        query = rotate((hidden @ layer["query"]).reshape(model.rows, -1, dim), positions)
        key = rotate((hidden @ layer["key"]).reshape(model.rows, -1, dim), positions)
        keys = keys.at[slots].set(key.reshape(model.rows, -1))
        values = values.at[slots].set(hidden @ layer["value"])
        written.append([keys, values])
        attended = attend(model, kv_heads, query, keys, values, tables, positions, num_spans)
        x = x + total(attended.reshape(model.rows, -1) @ layer["out"])
        hidden = norm(x)
        x = x + total((jax.nn.silu(hidden @ layer["gate"]) * (hidden @ layer["up"])) @ layer["down"])
    logits = (norm(x) @ weights["embedding"].T).astype(jnp.float32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), written


def sharded(model: Model, mesh: jax.sharding.Mesh, attend: Any) -> Any:
    """``step`` over the mesh's one axis."""
    specs = [jax.tree.map(lambda leaf: leaf[2], tree, is_leaf=is_shape) for tree in shapes(model)]
    return jax.shard_map(
        functools.partial(step, model, AXIS, attend),
        mesh=mesh,
        in_specs=(specs[0], specs[1], *specs[2]),
        out_specs=(P(), specs[1]),
        check_vma=False,
    )


def random_arrays(model: Model, seed: int) -> tuple[Tree, Tree]:
    random = np.random.default_rng(seed)
    weights, caches, _ = shapes(model)

    def weight(leaf: Any) -> jax.Array:
        shape, dtype, _ = leaf
        return jnp.asarray(random.standard_normal(shape) * shape[0] ** -0.5, dtype)

    def cache(leaf: Any) -> jax.Array:
        return jnp.zeros(leaf[0], leaf[1])

    return jax.tree.map(weight, weights, is_leaf=is_shape), jax.tree.map(cache, caches, is_leaf=is_shape)
