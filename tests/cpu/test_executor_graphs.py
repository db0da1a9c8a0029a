"""Which steps are captured, which graph serves which step, and that a replay does what an eager step does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from neighbours import neighbour

from isthmus.contract import CapturedGraph, GraphScope, Limits, Sampled, StepInputs
from isthmus.errors import Unsupported
from isthmus.executor.graphs import Captured, StepGraphs
from isthmus.executor.shapes import StepShape, decode_sizes
from isthmus.plan import StepPlan
from isthmus.reference import ReferenceBackend

executor_tests = neighbour(__file__, "test_executor")
alone, one_thread = executor_tests.alone, executor_tests.one_thread
capabilities, make_executor = executor_tests.capabilities, executor_tests.make_executor
Driver, sequences = executor_tests.Driver, executor_tests.sequences
ROWS, TOKENS, NUM_TOKENS = executor_tests.ROWS, executor_tests.TOKENS, executor_tests.NUM_TOKENS
T = TypeVar("T")


class RecordedGraph:
    """Replays a closure."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step, self.replays = step, 0

    def replay(self, num_tokens: int) -> Any:
        self.replays += 1
        return self.step()


class RecordingGraphs:
    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.graphs: dict[int, RecordedGraph] = {}
        self.order: list[int] = []

    def capture(self, step: Callable[[], T], num_tokens: int) -> CapturedGraph[T]:
        if self.refuse:
            raise Unsupported(self.refuse)
        step()
        self.graphs[num_tokens] = RecordedGraph(step)
        self.order.append(num_tokens)
        return self.graphs[num_tokens]


class GreedySampling:
    """Reference sampling knows the step's rows on the host only, so a recorded one is argmax alone."""

    def allocate(self, limits: Limits) -> None: ...
    def apply(self, state: Any, plan: StepPlan) -> None: ...

    def sample(self, logits: torch.Tensor, inputs: StepInputs, device: Any, state: Any, num_logprobs: int) -> Sampled:
        tokens = logits.argmax(-1).int()
        device.tokens[inputs.sample_rows, inputs.positions[inputs.sample_tokens] + 1] = tokens
        return Sampled(tokens=tokens, invalid=torch.zeros(len(tokens), dtype=torch.bool))

    def prompt_logprobs(self, logits: torch.Tensor, next_tokens: torch.Tensor, num_logprobs: int) -> Sampled:
        raise Unsupported("not in this test")


@pytest.mark.parametrize("scope", [GraphScope.FORWARD, GraphScope.STEP])
@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_graphs_replay_what_eager_steps_do(
    alone: list[list[int]], scope: GraphScope, any_size: bool, in_flight: int
) -> None:
    graphs = RecordingGraphs()
    backend = ReferenceBackend(
        capabilities=capabilities(graph_scope=scope, graph_any_size=any_size),
        graphs=graphs,
        sampling=GreedySampling() if scope is GraphScope.STEP else None,
    )
    executor = make_executor(backend, in_flight=in_flight)
    assert executor.capture() == ()
    if any_size:
        assert graphs.order == [ROWS if scope is GraphScope.STEP else TOKENS]
    else:
        assert graphs.order == sorted(decode_sizes(ROWS), reverse=True)
    driver = Driver(executor, sequences(37), chunk=7)
    assert driver.run(NUM_TOKENS) == alone[:37]
    replays = sum(graph.replays for graph in graphs.graphs.values())
    assert replays >= 9
    if any_size and scope is GraphScope.FORWARD:
        assert replays == driver.steps


def test_the_smallest_graph_that_fits_is_replayed() -> None:
    graphs = RecordingGraphs()
    backend = ReferenceBackend(capabilities=capabilities(graph_scope=GraphScope.FORWARD), graphs=graphs)
    executor = make_executor(backend)
    executor.capture()
    Driver(executor, sequences(9)).run(4)
    assert {size: graph.replays for size, graph in graphs.graphs.items() if graph.replays} == {16: 3}


@pytest.mark.parametrize("scope", [GraphScope.FORWARD, GraphScope.STEP])
def test_steps_of_any_spans_are_replayed_where_they_are_captured(alone: list[list[int]], scope: GraphScope) -> None:
    graphs = RecordingGraphs()
    backend = ReferenceBackend(
        capabilities=capabilities(graph_scope=scope, mixed_graph_tokens=(13, 100, 1000)),
        graphs=graphs,
        sampling=GreedySampling() if scope is GraphScope.STEP else None,
    )
    executor = make_executor(backend)
    assert executor.capture() == ()
    mixed = {item.shape.tokens: item.shape for item in executor.graphs.captured if not item.shape.single}
    assert mixed == {size: StepShape(size, min(size, ROWS), min(size, ROWS)) for size in (13, 100, TOKENS)}
    driver = Driver(executor, sequences(37), chunk=7)
    assert driver.run(NUM_TOKENS) == alone[:37]
    assert all(graphs.graphs[size].replays for size in (100, TOKENS))
    # Only steps of one token a row of which some do not sample.
    assert sum(graph.replays for graph in graphs.graphs.values()) >= driver.steps - 1


def test_which_graph_serves_which_step() -> None:
    shapes = [
        StepShape(4, 4, 4, single=True),
        StepShape(8, 8, 8, single=True),
        StepShape(8, 8, 8),
        StepShape(40, 10, 10),
    ]
    found = StepGraphs(scope=GraphScope.STEP, captured=tuple(Captured(shape, RecordedGraph(int)) for shape in shapes))

    def taken(tokens: int, spans: int, *, all_sampled: bool = True) -> StepShape | None:
        step = StepShape(tokens, spans, spans, single=tokens == spans)
        graph = found.find(step, all_sampled=all_sampled)
        return graph and graph.shape

    assert taken(3, 3) == shapes[0] and taken(5, 5) == shapes[1] and taken(9, 9) is None
    assert taken(3, 3, all_sampled=False) is None  # as many logits as tokens, whichever samples
    assert taken(8, 7) == taken(8, 7, all_sampled=False) == shapes[2]
    assert taken(9, 1) == taken(40, 10) == shapes[3]
    assert taken(12, 11) is None and taken(41, 1) is None


def test_steps_that_a_captured_one_cannot_serve_run_eagerly() -> None:
    class Partly(GreedySampling):
        def replayable(self, state: Any) -> bool:
            return False

    for sampling, expected in ((GreedySampling(), 3), (Partly(), 0)):
        graphs = RecordingGraphs()
        backend = ReferenceBackend(
            capabilities=capabilities(graph_scope=GraphScope.STEP), graphs=graphs, sampling=sampling
        )
        executor = make_executor(backend)
        executor.capture()
        Driver(executor, sequences(9)).run(4)
        assert sum(graph.replays for graph in graphs.graphs.values()) == expected


def test_a_refused_capture_says_why_and_steps_run_eagerly(alone: list[list[int]]) -> None:
    backend = ReferenceBackend(
        capabilities=capabilities(graph_scope=GraphScope.STEP), graphs=RecordingGraphs(refuse="not on Tuesdays")
    )
    executor = make_executor(backend)
    assert executor.capture() == ("steps run eagerly: not on Tuesdays",)
    assert Driver(executor, sequences(5)).run(NUM_TOKENS) == alone[:5]


def test_capture_stops_where_memory_ends(alone: list[list[int]]) -> None:
    class Scarce(RecordingGraphs):
        def capture(self, step: Callable[[], T], num_tokens: int) -> CapturedGraph[T]:
            if num_tokens < 40:
                raise torch.OutOfMemoryError("full")
            return super().capture(step, num_tokens)

    graphs = Scarce()
    backend = ReferenceBackend(capabilities=capabilities(graph_scope=GraphScope.FORWARD), graphs=graphs)
    executor = make_executor(backend)
    (note,) = executor.capture()
    assert "size 32" in note and "holds 40 rows" in note
    assert Driver(executor, sequences(5)).run(NUM_TOKENS) == alone[:5]
    assert graphs.graphs[40].replays == NUM_TOKENS - 1
