"""Capture of a step as a graph of the device's runtime, on every device that torch reaches as ``torch.cuda``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from isthmus.contract import CapturedGraph
from isthmus.errors import Unsupported

T = TypeVar("T")


class _Replay(Generic[T]):
    def __init__(self, graph: torch.cuda.CUDAGraph, output: T) -> None:
        self._graph = graph
        self._output = output

    def replay(self, num_tokens: int) -> T:
        self._graph.replay()
        return self._output


class StreamGraphs:
    """:class:`isthmus.contract.Graphs`.

    All graphs share one memory pool: they never run at once, and each one's outputs are read before
    the next replay.  Capture the largest first, so that the smaller ones fit into its memory.  A graph
    that is never replayed holds the pool: torch gives one up with the last graph in it, keeps its memory
    all the same, and what is captured afterwards has to have another.
    ``torch.cuda.graph`` would synchronise, collect garbage and empty the caches for every capture;
    here the collector is held off instead, since it might free device memory in mid-capture.
    """

    def __init__(self, device: torch.device, reason: str | None = None) -> None:
        self._device = device
        self._reason = reason
        self._holder: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device)

    def capture(self, step: Callable[[], T], num_tokens: int) -> CapturedGraph[T]:
        if self._reason is not None:
            raise Unsupported(self._reason)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        if self._holder is None:
            handle = torch.cuda.graph_pool_handle()
            self._holder, _ = self._captured(lambda: torch.zeros(1, device=self._device), handle)
        graph, output = self._captured(step, self._holder.pool())
        current.wait_stream(self._stream)
        return _Replay(graph, output)

    def _captured(self, step: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    output = step()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph, output
