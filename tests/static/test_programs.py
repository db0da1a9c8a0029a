"""What is compiled lives no longer than what it was compiled for."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus_static.programs import Programs


class Feed:
    def __init__(self) -> None:
        self.ints = torch.zeros(4, dtype=torch.int32)
        self.floats = torch.zeros(4)

    def flush(self) -> None:
        pass


class Compiler:
    """A Dynamo compiler that runs graphs as they are, and knows which of them are still there."""

    def __init__(self) -> None:
        self.graphs: list[weakref.ref[torch.fx.GraphModule]] = []
        self.fails = False

    def __call__(self, graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs.append(weakref.ref(graph))

        def run(*arguments: Tensor) -> Any:
            if self.fails:
                raise MemoryError("a failure that was asked for")
            return graph(*arguments)

        return run

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(graph() is not None for graph in self.graphs)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: made)
    return made


def double(tensor: Tensor) -> Tensor:
    return tensor * 2


def test_a_graph_goes_with_the_last_that_replays_it(compiler: Compiler) -> None:
    programs, weight = Programs("any"), torch.full((4,), 3.0)
    feed = Feed()
    programs.feed(feed)
    captured = programs.capture(lambda: weight + feed.ints, 4)
    assert captured.replay(4).tolist() == [3.0] * 4
    assert compiler.alive == len(compiler.graphs) == 1
    del captured
    assert compiler.alive == 0


def test_small_programs_go_when_another_engine_begins(compiler: Compiler) -> None:
    programs = Programs("any")
    programs.feed(Feed())
    for size in (3, 5, 3):
        assert programs.run("double", double, torch.ones(size)).tolist() == [2.0] * size
    assert compiler.alive == len(compiler.graphs) == 2
    programs.feed(Feed())
    assert compiler.alive == 0


def test_a_program_whose_first_run_fails_goes_too(compiler: Compiler) -> None:
    programs = Programs("any")
    programs.feed(Feed())
    compiler.fails = True
    with pytest.raises(MemoryError, match="asked for"):
        programs.run("double", double, torch.ones(3))
    assert compiler.alive == 0
    compiler.fails = False
    assert programs.run("double", double, torch.ones(3)).tolist() == [2.0] * 3


def test_what_stays_of_a_compilation_does_not_grow_with_the_model(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something does: Dynamo keeps some objects for each.  Of its guards it kept several for each weight."""
    # pytest would keep what Dynamo logs, which it does only because pytest listens.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    programs = Programs("any")
    programs.feed(Feed())
    few, many = ([torch.ones(2) for _ in range(count)] for count in (2, 60))

    def objects_kept(weights: list[Tensor]) -> int:
        gc.collect()
        before = len(gc.get_objects())
        programs.capture(lambda: sum((F.silu(weight) for weight in weights), torch.zeros(2)), 4)
        gc.collect()
        return len(gc.get_objects()) - before

    for weights in (few, many):  # fills what is kept once
        objects_kept(weights)
    assert objects_kept(many) < objects_kept(few) + len(many)
