"""The prefix cache at size: looking up a 32k-token prompt, and turning blocks over, as the cache grows.

    python benchmarks/prefix_cache.py [--repeats 20]

Prints JSON: milliseconds to hash and look up the prompt (``lookup_ms``), to hold its 2,048 blocks and
let them go (``hold_ms``), and microseconds a block to evict one and cache another (``turnover_us``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from isthmus.cache import BlockManager

BLOCK_SIZE = 16
PROMPT_BLOCKS = 2048
SIZES = (4_000, 20_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats: int = parser.parse_args().repeats
    cases = [{"cached_blocks": size, **measure(size, repeats)} for size in SIZES]
    json.dump({"benchmark": "prefix_cache", "repeats": repeats, "cases": cases}, sys.stdout, indent=1)
    sys.stdout.write("\n")


def measure(num_blocks: int, repeats: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    manager = BlockManager(num_blocks + 1, BLOCK_SIZE, seed=b"benchmark")
    manager.open_rows(1, PROMPT_BLOCKS * BLOCK_SIZE)
    prompt = tokens_of(rng)
    cache_prompt(manager, prompt)
    while len(manager.cache) + PROMPT_BLOCKS <= num_blocks:
        cache_prompt(manager, tokens_of(rng))
    keys: list[bytes] = []
    manager.cache.extend_keys(keys, prompt, b"")

    def look_up() -> None:
        mine: list[bytes] = []
        manager.cache.extend_keys(mine, prompt, b"")
        assert manager.cache.match(mine, len(mine)) == PROMPT_BLOCKS

    def hold() -> None:
        manager.adopt(0, keys)
        manager.release(0)

    found = {"lookup_ms": spread(look_up, repeats, 1e3), "hold_ms": spread(hold, repeats, 1e3)}
    rounds = iter([tokens_of(rng) for _ in range(repeats)])
    found["turnover_us"] = spread(lambda: cache_prompt(manager, next(rounds)), repeats, 1e6 / PROMPT_BLOCKS)
    return dict(found)


def tokens_of(rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return rng.integers(0, 30_000, PROMPT_BLOCKS * BLOCK_SIZE).astype(np.int32)


def cache_prompt(manager: BlockManager, tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
    keys: list[bytes] = []
    manager.cache.extend_keys(keys, tokens, b"")
    manager.grow(np.zeros(1, np.int32), np.array([len(keys)], np.int32))
    assert manager.share(0, keys, 0, len(keys), 0)
    manager.release(0)


def spread(run: Callable[[], None], repeats: int, scale: float) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * scale)
    return {
        "median": round(float(np.median(times)), 3),
        "min": round(min(times), 3),
        "max": round(max(times), 3),
    }


if __name__ == "__main__":
    main()
