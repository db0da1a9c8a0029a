"""An engine in the caller's own process, for offline use: no sockets, no threads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

from isthmus.config import EngineOptions
from isthmus.engine.build import build_engine
from isthmus.engine.core import EngineCore
from isthmus.engine.messages import AddRequest, EngineReady, EngineStats, TokensOut
from isthmus.errors import EngineDead


class LocalEngine:
    """Runs requests to their end.  Not for several threads at once."""

    def __init__(self, core: EngineCore, ready: EngineReady) -> None:
        self._core = core
        self._ids = itertools.count()
        self.ready = ready

    @classmethod
    def start(cls, options: EngineOptions, *, progress: bool = True) -> LocalEngine:
        """Load everything; raises as :func:`build_engine` does."""
        return cls(*build_engine(options, progress=progress))

    @property
    def stats(self) -> EngineStats:
        return self._core.stats()

    def next_request_id(self) -> int:
        return next(self._ids)

    def generate(self, requests: Iterable[AddRequest]) -> Iterator[TokensOut]:
        """What each step brings, for all of ``requests``, until every one has a ``finish_reason``.

        Requests are taken from the iterable as there is room for them to wait, so it may be longer
        than the queue.  Closing the iterator aborts what is still running.  Raises
        :class:`isthmus.errors.InvalidRequest` for a request that can never run, which aborts the
        others, and :class:`isthmus.errors.EngineDead` when the device keeps failing.
        """
        incoming = iter(requests)
        running: set[int] = set()
        try:
            while True:
                room = self.ready.max_waiting - self._core.num_waiting
                for request in itertools.islice(incoming, room):
                    self._core.add(request)
                    running.add(request.request_id)
                if not running:
                    return
                outputs = self._core.step()
                if self._core.stalled:
                    raise EngineDead(f"nothing can run, though {len(running)} requests wait; please report this")
                for item in outputs:
                    if item.finish_reason is not None:
                        running.discard(item.request_id)
                    yield item
        finally:
            self._core.abort(running)
            with contextlib.suppress(EngineDead):
                while self._core.has_work and not self._core.stalled:
                    self._core.step()

    def close(self) -> None:
        """Give back the device; the object is not used afterwards."""
        self._core.close()
