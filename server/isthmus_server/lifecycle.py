"""What the server is doing: starting, ready, draining, dead; and which requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from isthmus_server.api_error import ApiError, unavailable


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    GRACE = "grace"
    """Draining has begun; new requests are still taken, because the news takes time to travel."""
    DRAINING = "draining"
    """New requests are refused, running ones finish."""
    DEAD = "dead"
    """The engine is gone; nothing can be answered any more."""


class RunningRequest:
    """One generation in progress.

    Its task is cancelled either because the client went (``gone``) or because the server ends it
    (``cut`` says why).  ``done`` forbids both: what is left is to write the answer's end.
    """

    __slots__ = ("cut", "done", "gone", "task")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.cut: ApiError | None = None
        self.gone = False
        self.done = False


class Lifecycle:
    """The phase, and the running requests.  Used from the event loop only."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.running: set[RunningRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send requests here."""
        return self.phase is Phase.READY

    @property
    def accepting(self) -> bool:
        return self.phase in (Phase.READY, Phase.GRACE)

    @property
    def draining(self) -> bool:
        return self.phase in (Phase.GRACE, Phase.DRAINING)

    def require_accepting(self) -> None:
        """Raises :class:`ApiError` with 503 unless a new request may start."""
        if self.accepting:
            return
        if self.phase is Phase.STARTING:
            raise unavailable("the model is still loading", "not_ready", retry_after_s=2)
        if self.phase is Phase.DRAINING:
            raise unavailable("the server is shutting down", "draining", retry_after_s=5, close=True)
        raise unavailable(
            "the engine has ended; the server is shutting down", "engine_dead", retry_after_s=5, close=True
        )

    @contextmanager
    def request(self) -> Iterator[RunningRequest]:
        """Counts the current task as a running request.  Raises :class:`ApiError` unless accepting."""
        self.require_accepting()
        task = asyncio.current_task()
        assert task is not None, "requests run in a task"
        running = RunningRequest(task)
        self.running.add(running)
        self._idle.clear()
        try:
            yield running
        finally:
            self.running.discard(running)
            if not self.running:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether every running request finished within ``timeout_s``."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def cut_all(self, error: ApiError) -> int:
        """Ends every running request with ``error``; returns how many there were."""
        victims = [request for request in self.running if not (request.cut or request.gone or request.done)]
        for request in victims:
            request.cut = error
            request.task.cancel()
        return len(victims)
