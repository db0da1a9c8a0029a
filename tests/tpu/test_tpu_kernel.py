"""The Pallas kernel in TPU interpret mode, which runs its copies and semaphores, against the torch reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from isthmus_tpu.kernels import reference


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 16
    query_tile: int = 1
    chunk_tokens: int = 32
    window: int = 0
    softcap: float = 0.0
    longest: int = 90

    @property
    def static(self) -> dict[str, float]:
        return {
            "kv_heads": self.kv_heads,
            "block_size": self.block_size,
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "softcap": self.softcap,
        }


DECODE = (1, 1, 1, 1, 1)
MIXED = (5, 1, 19, 1)
CASES = {
    "decode": Case(lengths=DECODE),
    "decode, one span": Case(lengths=(1,), heads=8, kv_heads=8),
    "decode, two heads a group": Case(lengths=DECODE, heads=8, kv_heads=4, head_dim=64),
    "decode, a group half empty": Case(lengths=DECODE, heads=9, kv_heads=3, head_dim=64),
    "decode, four heads a group": Case(lengths=DECODE, heads=6, kv_heads=6, head_dim=32),
    "decode, wide heads, window": Case(lengths=DECODE, head_dim=256, window=21, block_size=32),
    "decode, window under a block": Case(lengths=DECODE, window=5),
    "decode, softcap": Case(lengths=DECODE, softcap=2.0),
    "decode, one chunk holds all": Case(lengths=DECODE, chunk_tokens=0),
    "prefill": Case(lengths=(37, 20), query_tile=8),
    "prefill, tile wider than spans": Case(lengths=(3, 9, 2), query_tile=16, block_size=32, chunk_tokens=64),
    "mixed": Case(lengths=MIXED, query_tile=8, heads=8),
    "mixed, window": Case(lengths=MIXED, query_tile=8, window=7, softcap=5.0, heads=6, kv_heads=3, head_dim=64),
    "mixed in tiles of one": Case(lengths=MIXED),
}


def batch(case: Case, seed: int) -> tuple[NDArray[np.float32] | NDArray[np.int32], ...]:
    """A step with padded spans and tokens; every slot that no span holds, and every padded index, is poison."""
    random = np.random.default_rng(seed)
    spans, padded = len(case.lengths), 2
    contexts = [length + int(random.integers(0, case.longest)) for length in case.lengths]
    held = [-(-context // case.block_size) for context in contexts]
    blocks = 1 + sum(held)
    free = list(random.permutation(np.arange(1, blocks)))
    tables = random.integers(0, blocks, (spans + padded, max(held) + 1)).astype(np.int32)

    width = -(-case.kv_heads * case.head_dim // 128) * 128
    keys, values = (random.standard_normal((blocks * case.block_size, width), np.float32) for _ in range(2))
    used = np.zeros(len(keys), bool)
    for span, context in enumerate(contexts):
        tables[span, : held[span]] = [free.pop() for _ in range(held[span])]
        slots = tables[span, : held[span], None] * case.block_size + np.arange(case.block_size)
        used[slots.ravel()[:context]] = True
    keys[~used], values[~used] = np.nan, np.nan

    tokens = sum(case.lengths)
    query = random.standard_normal((tokens + 3, case.heads, case.head_dim), np.float32)
    query[tokens:] = np.nan
    starts = np.concatenate([[0], np.cumsum(case.lengths), random.integers(0, tokens, padded)]).astype(np.int32)
    lengths = np.concatenate([contexts, random.integers(0, 99, padded)]).astype(np.int32)
    return query, keys, values, tables, starts, lengths, np.array([spans], np.int32)


def attend(case: Case, arrays: tuple[NDArray[np.float32] | NDArray[np.int32], ...], dtype: str) -> NDArray[np.float32]:
    import jax
    import jax.numpy as jnp
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    from isthmus_tpu.kernels.ragged_paged_attention import ragged_paged_attention

    def step(*inputs: jax.Array) -> jax.Array:
        tiles = {"query_tile": case.query_tile, "chunk_tokens": case.chunk_tokens}
        return ragged_paged_attention(*inputs, **case.static, **tiles)

    inputs = [jnp.asarray(x, dtype if x.dtype == np.float32 else None) for x in arrays]
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        out = np.asarray(jax.jit(step)(*inputs), np.float32)
    assert not interpret_pallas_call.races.races_found
    return out


def expected(
    case: Case, arrays: tuple[NDArray[np.float32] | NDArray[np.int32], ...], dtype: str
) -> NDArray[np.float32]:
    inputs = [torch.from_numpy(x) for x in arrays]
    inputs = [x.to(getattr(torch, dtype)) if x.is_floating_point() else x for x in inputs]
    out: NDArray[np.float32] = reference.ragged_paged_attention(*inputs, **case.static).float().numpy()
    return out


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str) -> None:
    case = CASES[name]
    arrays = batch(case, seed=len(name))
    out, want = attend(case, arrays, "float32"), expected(case, arrays, "float32")
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=1e-4)
    assert not out[sum(case.lengths) :].any(), "padded tokens must be 0"


@pytest.mark.parametrize("name", ["decode", "decode, a group half empty", "mixed, window"])
def test_kernel_equals_reference_in_bfloat16(name: str) -> None:
    case = CASES[name]
    arrays = batch(case, seed=7)
    out, want = attend(case, arrays, "bfloat16"), expected(case, arrays, "bfloat16")
    np.testing.assert_allclose(out, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(seed: int) -> None:
    random = np.random.default_rng(seed)
    kv_heads = int(random.integers(1, 4))
    case = Case(
        lengths=tuple(int(n) for n in random.choice([1, 1, 2, 7, 18], random.integers(1, 6))),
        heads=kv_heads * int(random.choice([1, 2, 5])),
        kv_heads=kv_heads,
        head_dim=int(random.choice([64, 128])),
        block_size=int(random.choice([16, 32])),
        query_tile=int(random.choice([1, 8])),
        chunk_tokens=int(random.choice([32, 64])),
        window=int(random.choice([0, 0, 3, 40])),
        softcap=float(random.choice([0.0, 0.0, 3.0])),
    )
    arrays = batch(case, seed)
    np.testing.assert_allclose(attend(case, arrays, "float32"), expected(case, arrays, "float32"), atol=2e-5, rtol=1e-4)


def test_shapes_that_no_tile_fits_are_refused() -> None:
    for change, problem in (
        ({"block_size": 12}, "block_size 12 must be a multiple"),
        ({"head_dim": 96}, "head_dim 96"),
        ({"heads": 5}, "5 query heads do not divide"),
    ):
        case = Case(lengths=DECODE, **change)
        with pytest.raises(ValueError, match=problem):
            attend(case, batch(case, seed=0), "float32")
