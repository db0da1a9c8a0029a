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

    broken = False

    def __init__(self, keep_graph: bool) -> None:
        self.executable = not keep_graph

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert pool not in users or users[pool] > 0, "the pool was given up"
        users[pool] += 1
        self.pool = pool

    def capture_end(self) -> None:
        pass

    def instantiate(self) -> None:
        if self.broken:
            raise RuntimeError("it cannot run")
        self.executable = True

    def replay(self) -> None:
        assert self.executable

    def __del__(self) -> None:
        if hasattr(self, "pool"):
            users[self.pool] -= 1


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
        "set_device": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return StreamGraphs(torch.device("cuda", 0))


def test_graphs_that_live_share_a_pool_and_later_ones_have_another(graphs: StreamGraphs) -> None:
    first: list[Any] = [graphs.capture(lambda: 7, size) for size in (2, 1)]
    assert [graph.replay(1) for graph in first] == [7, 7]
    assert dict(users) == {1: 2}
    del first[0]
    first.append(graphs.capture(lambda: 8, 2))
    assert dict(users) == {1: 2}
    first.clear()
    second = graphs.capture(lambda: 9, 2)
    assert second.replay(1) == 9
    assert dict(users) == {1: 0, 2: 1}


def test_a_capture_that_fails_leaves_nothing_behind(graphs: StreamGraphs) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            graphs.capture(fail, 1)
    assert graphs.capture(lambda: 3, 1).replay(1) == 3


def test_a_graph_that_cannot_be_made_executable_says_so_when_it_is_replayed(
    graphs: StreamGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "broken", True)
        graph = graphs.capture(lambda: 3, 1)
        with pytest.raises(RuntimeError, match="it cannot run"):
            graph.replay(1)
    assert graphs.capture(lambda: 4, 1).replay(1) == 4
