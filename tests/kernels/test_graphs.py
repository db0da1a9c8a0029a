"""Capture over a runtime that counts its pools as torch's allocator does."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import count
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from isthmus_triton.graphs import StreamGraphs

users: Counter[int] = Counter()


class Graph:
    """Of torch: a pool whose last graph is gone may not be captured into again."""

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert pool not in users or users[pool] > 0, "the pool was given up"
        users[pool] += 1
        self.in_pool = pool

    def pool(self) -> int:
        return self.in_pool

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if hasattr(self, "in_pool"):
            users[self.in_pool] -= 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StreamGraphs:
    users.clear()
    handles = count(1)
    for name, value in {
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: next(handles),
        "Stream": Mock(),
        "current_stream": Mock(),
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", Mock())  # there is no device to allocate on
    return StreamGraphs(torch.device("cuda", 0))


def test_all_graphs_share_a_pool_that_is_never_given_up(graphs: StreamGraphs) -> None:
    first: list[Any] = [graphs.capture(lambda: 7, size) for size in (2, 1)]
    assert [graph.replay(1) for graph in first] == [7, 7]
    assert list(users.values()) == [3]
    first.clear()
    assert list(users.values()) == [1]
    second = graphs.capture(lambda: 9, 2)
    assert second.replay(1) == 9
    assert list(users.values()) == [2]


def test_a_capture_that_fails_leaves_nothing_behind(graphs: StreamGraphs) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            graphs.capture(fail, 1)
    assert graphs.capture(lambda: 3, 1).replay(1) == 3
