"""Four-way tensor parallel decode on four virtual CPU devices against one; prints its figures as JSON."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from decode_step import AXIS, Model, gather, random_arrays, sharded, step

MODEL = Model(layers=2, hidden=64, heads=8, kv_heads=4, inner=128, vocab=128, num_blocks=16, rows=2, dtype="float32")
STEPS = 20


def main() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    tokens_one, keys_one = generate(jax.jit(functools.partial(step, MODEL, None, gather)))
    tokens_four, keys_four = generate(jax.jit(sharded(MODEL, mesh, gather)))
    print(
        json.dumps(
            {
                "devices": len(jax.devices()),
                "tokens_equal": tokens_one == tokens_four,
                "distinct_tokens": len({token for row in tokens_one for token in row}),
                "max_key_error": float(np.abs(keys_one - keys_four).max()),
                "max_key": float(np.abs(keys_one).max()),
            }
        )
    )


def generate(function: object) -> tuple[list[list[int]], object]:
    """Tokens of ``STEPS`` steps, and the last layer's keys after them."""
    weights, caches = random_arrays(MODEL, seed=3)
    tables = jnp.asarray(np.random.default_rng(4).permutation(np.arange(1, 16))[:14].reshape(2, 7), jnp.int32)
    tables = jnp.pad(tables, ((0, 0), (0, 1)))
    tokens, seen = jnp.asarray([3, 5], jnp.int32), []
    for position in range(STEPS):
        positions = jnp.full(2, position, jnp.int32)
        slots = tables[:, position // MODEL.block_size] * MODEL.block_size + position % MODEL.block_size
        tokens, caches = function(weights, caches, tokens, positions, slots, tables, jnp.asarray([2], jnp.int32))
        seen.append([int(token) for token in tokens])
    return seen, np.asarray(caches[-1][0])


if __name__ == "__main__":
    main()
