"""Block pool, block tables and prefix cache, one rule at a time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from isthmus.cache import BlockManager, BlockPool, PrefixCache

SIZE = 4


def tokens(*blocks: int) -> np.ndarray:
    return np.repeat(np.array(blocks, np.int32), SIZE)


def keys_of(manager: BlockManager, *blocks: int, salt: bytes = b"") -> list[bytes]:
    keys: list[bytes] = []
    manager.cache.extend_keys(keys, tokens(*blocks), salt)
    return keys


def manager_of(num_blocks: int = 9, rows: int = 4) -> BlockManager:
    manager = BlockManager(num_blocks, SIZE, seed=b"test")
    manager.open_rows(rows, 16 * SIZE)
    return manager


def fill(manager: BlockManager, row: int, *blocks: int) -> list[bytes]:
    """Row ``row`` computes these blocks, taking what is cached, and shares them."""
    keys = keys_of(manager, *blocks)
    cached = manager.cache.match(keys, len(keys))
    manager.adopt(row, keys[:cached])
    manager.grow(np.array([row], np.int32), np.array([len(keys) - cached], np.int32))
    assert manager.share(row, keys, cached, len(keys), 0)
    return keys


def test_the_spare_block_is_never_handed_out():
    pool = BlockPool(5)
    assert sorted(pool.take(4).tolist()) == [1, 2, 3, 4]
    with pytest.raises(AssertionError):
        pool.take(1)


def test_a_held_block_cannot_be_freed():
    pool = BlockPool(5)
    with pytest.raises(AssertionError):
        pool.put_back(pool.take(1))


def test_a_growing_table_gets_as_many_blocks_as_it_lacks():
    manager = manager_of()
    rows = np.array([2, 0], np.int32)
    missing = manager.missing(rows, np.array([SIZE + 1, SIZE], np.int32))
    assert missing.tolist() == [2, 1]
    edits = manager.grow(rows, missing)
    assert edits.rows.tolist() == [2, 2, 0]
    assert edits.indices.tolist() == [0, 1, 0]
    assert manager.tables[2, :2].tolist() == edits.ids[:2].tolist()
    assert manager.missing(rows, np.array([SIZE * 2 + 1, SIZE], np.int32)).tolist() == [1, 0]


def test_a_key_names_the_whole_prefix_and_the_salt():
    manager = manager_of()
    assert keys_of(manager, 1, 2)[1] != keys_of(manager, 3, 2)[1]
    assert keys_of(manager, 1, 2) != keys_of(manager, 1, 2, salt=b"tenant")
    extended = keys_of(manager, 1, 2)
    manager.cache.extend_keys(extended, tokens(1, 2, 3), b"")
    assert extended == keys_of(manager, 1, 2, 3)


def test_each_process_has_its_own_keys():
    first, second = (PrefixCache(BlockPool(4), SIZE) for _ in range(2))
    one: list[bytes] = []
    other: list[bytes] = []
    first.extend_keys(one, tokens(1), b"")
    second.extend_keys(other, tokens(1), b"")
    assert one != other


def test_a_prefix_is_found_as_far_as_it_is_cached():
    manager = manager_of()
    fill(manager, 0, 1, 2, 3)
    assert manager.cache.match(keys_of(manager, 1, 2, 4), 3) == 2
    assert manager.cache.match(keys_of(manager, 1, 2, 3), 2) == 2
    assert manager.cache.match(keys_of(manager, 2), 1) == 0


def test_shared_blocks_are_held_by_each_row_and_rest_after_the_last():
    manager = manager_of()
    fill(manager, 0, 1, 2)
    fill(manager, 1, 1, 2)
    assert manager.tables[0, :2].tolist() == manager.tables[1, :2].tolist()
    assert manager.num_used == 2
    manager.release(0)
    assert manager.num_used == 2 and manager.cache.num_idle == 0
    manager.release(1)
    assert manager.num_used == 0 and manager.cache.num_idle == 2


def test_a_block_that_is_not_cached_is_free_at_once():
    manager = manager_of()
    manager.grow(np.array([0], np.int32), np.array([3], np.int32))
    manager.release(0)
    assert manager.pool.num_free == 8 and manager.cache.num_idle == 0


def test_leaves_are_evicted_least_recently_used_first():
    manager = manager_of(num_blocks=7)
    for row, last in enumerate((10, 11, 12)):
        fill(manager, row, 1, last)
    for row in (1, 0, 2):
        manager.release(row)
    manager.cache.evict(1)
    assert [manager.cache.match(keys_of(manager, 1, last), 2) for last in (10, 11, 12)] == [2, 1, 2]
    fill(manager, 0, 1, 10)
    manager.release(0)
    manager.cache.evict(1)
    assert [manager.cache.match(keys_of(manager, 1, last), 2) for last in (10, 12)] == [2, 1]


def test_a_held_block_is_never_evicted():
    manager = manager_of(num_blocks=5)
    fill(manager, 0, 1, 2)
    fill(manager, 1, 3, 4)
    manager.release(0)
    assert manager.num_available == 2
    manager.grow(np.array([2], np.int32), np.array([2], np.int32))
    assert manager.cache.match(keys_of(manager, 3, 4), 2) == 2
    assert manager.cache.match(keys_of(manager, 1, 2), 2) == 0


def test_the_second_copy_of_a_block_stays_private():
    manager = manager_of()
    keys = fill(manager, 0, 1, 2)
    manager.grow(np.array([1], np.int32), np.array([2], np.int32))
    assert not manager.share(1, keys, 0, 2, 0)
    manager.release(1)
    assert manager.num_used == 2 and len(manager.cache) == 2


def test_forgetting_takes_what_follows_and_leaves_holders_alone():
    manager = manager_of()
    fill(manager, 0, 1, 2, 3)
    fill(manager, 1, 1, 5)
    manager.cache.forget(manager.tables[0, 1:2].copy())
    assert manager.cache.match(keys_of(manager, 1, 2, 3), 3) == 1
    assert manager.cache.match(keys_of(manager, 1, 5), 2) == 2
    assert manager.counts[0] == 3
    manager.release(0)
    assert manager.pool.num_free == 8 - 2
    assert not manager.share(0, keys_of(manager, 1, 2, 3, 4), 3, 3, 0)


def test_forgetting_by_step_keeps_what_was_planned_before():
    manager = manager_of()
    keys = keys_of(manager, 1, 2)
    manager.grow(np.array([0], np.int32), np.array([2], np.int32))
    assert manager.share(0, keys, 0, 1, 6) and manager.share(0, keys, 1, 2, 7)
    manager.cache.forget_since(7)
    assert manager.cache.match(keys, 2) == 1


def test_out_of_date_leaves_do_not_pile_up():
    manager = manager_of(num_blocks=5)
    for _ in range(1000):
        fill(manager, 0, 1, 2)
        manager.release(0)
    assert len(manager.cache._leaves) <= 2 * manager.pool.num_blocks + 1
    manager.cache.evict(2)
    assert manager.pool.num_free == 4


def test_a_long_prompt_is_looked_up_in_a_cache_of_100_000_blocks():
    manager = BlockManager(110_000, 16, seed=b"test")
    manager.open_rows(1, 16 * 105_000)
    everything = np.random.default_rng(0).integers(0, 30_000, 16 * 100_000).astype(np.int32)
    keys: list[bytes] = []
    manager.cache.extend_keys(keys, everything, b"")
    manager.grow(np.zeros(1, np.int32), np.array([100_000], np.int32))
    assert manager.share(0, keys, 0, 100_000, 0)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        mine: list[bytes] = []
        manager.cache.extend_keys(mine, everything[:32_768], b"")
        assert manager.cache.match(mine, 2047) == 2047
        times.append(time.perf_counter() - began)
    assert min(times) < 0.005 * 4  # room for a busy machine; benchmarks/prefix_cache.py has the figure
