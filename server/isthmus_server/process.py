"""The server process: its start, its end, and what it does about signals and a dead engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from isthmus.engine.client import AsyncEngineClient
from isthmus.model.source import resolve_model
from isthmus_server.api_error import unavailable
from isthmus_server.lifecycle import Phase
from isthmus_server.listening import address, is_reachable, listen
from isthmus_server.settings import ServerSettings

if TYPE_CHECKING:
    from isthmus.model.source import ModelSource
    from isthmus.text.tokenizer import Tokenizer
    from isthmus_server.http_protocol import HttpServer
    from isthmus_server.service import Service

logger = logging.getLogger(__name__)

STATS_POLL_S: Final = 0.05
CUT_S: Final = 3.0
"""How long requests that were cut may take to say so to their clients."""
EXIT_DEAD: Final = 1
EXIT_FORCED: Final = 1


def run(settings: ServerSettings) -> int:
    """Serve until told to end; the exit status.

    Raises :class:`isthmus.errors.IsthmusError` when the server could not start.
    """
    sock = listen(settings.host, settings.port, settings.uds)
    try:
        # Before the engine is started, so that a wrong path is all that is told of.
        source = resolve_model(settings.engine.model.model, settings.engine.model.revision, weights=False)
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            return runner.run(ServerProcess(settings, sock, source).main())
    finally:
        sock.close()
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not made for this system
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class ServerProcess:
    """Order of the start: socket, engine process, HTTP with probes, model, the line that says so."""

    def __init__(self, settings: ServerSettings, sock: socket.socket, source: ModelSource) -> None:
        self._settings = settings
        self._sock = sock
        self._source = source
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._started_s = time.monotonic()

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        starting = asyncio.create_task(self._start_engine())
        await asyncio.sleep(0)  # the engine process loads while this one imports
        from isthmus.text.tokenizer import Tokenizer
        from isthmus_server.app import create_app
        from isthmus_server.http_protocol import HttpServer
        from isthmus_server.service import Service

        tokenizer = loop.run_in_executor(None, Tokenizer.load, self._source)
        service = Service(self._settings)
        http = HttpServer(create_app(service))
        serving = asyncio.create_task(http.serve(sockets=[self._sock]))
        try:
            loaded = await self._or_stopped(starting, tokenizer)
            if loaded is None:
                return 0
            engine, text = loaded
            try:
                return await self._serve(service, engine, http, text)
            finally:
                await engine.shutdown(timeout_s=0.0 if self._force.is_set() else 5.0)
        finally:
            http.should_exit = True
            await serving
            service.close()

    async def _serve(self, service: Service, engine: AsyncEngineClient, http: HttpServer, tokenizer: Tokenizer) -> int:
        await http.accepting.wait()
        service.open(engine, tokenizer)
        self._announce(service, engine)
        watching = asyncio.create_task(self._watch(service, engine))
        stopping = asyncio.create_task(self._stop.wait())
        dying = asyncio.create_task(engine.wait_dead())
        try:
            await asyncio.wait((stopping, dying), return_when=asyncio.FIRST_COMPLETED)
            if not dying.done():
                draining = asyncio.create_task(self._drain(service))
                await asyncio.wait((draining, dying), return_when=asyncio.FIRST_COMPLETED)
                if draining.done():
                    return draining.result()
                draining.cancel()
            return await self._mourn(service, dying.result())
        finally:
            for task in (watching, stopping, dying):
                task.cancel()

    async def _drain(self, service: Service) -> int:
        lifecycle, settings = service.lifecycle, self._settings
        lifecycle.phase = Phase.GRACE
        logger.info("Shutting down: %d requests are running", len(lifecycle.running))
        if settings.drain_grace_s > 0:
            await self._unless_forced(asyncio.sleep(settings.drain_grace_s))
        lifecycle.phase = Phase.DRAINING
        await self._unless_forced(lifecycle.wait_idle(settings.shutdown_timeout_s))
        cut = lifecycle.cut_all(
            unavailable(
                "the server shut down before this request was complete", "shutdown", retry_after_s=5, close=True
            )
        )
        if cut:
            logger.warning("%d requests were cut; --shutdown-timeout-s is %g", cut, settings.shutdown_timeout_s)
            await lifecycle.wait_idle(CUT_S)
        logger.info("Shutdown complete.")
        return EXIT_FORCED if self._force.is_set() else 0

    async def _mourn(self, service: Service, reason: str) -> int:
        """The engine is gone: say so to whoever asks, for a moment, then end."""
        service.lifecycle.phase = Phase.DEAD
        logger.error("The engine is dead: %s. The server ends; restart it.", reason)
        await self._unless_forced(asyncio.sleep(self._settings.dead_linger_s))
        return EXIT_DEAD

    async def _watch(self, service: Service, engine: AsyncEngineClient) -> None:
        was_stuck = False
        while True:
            if engine.stats is not None:
                service.telemetry.saw_stats(engine.stats)
            why = service.liveness()
            if why is not None and not was_stuck and engine.alive:
                logger.error("/livez fails: %s", why)
            was_stuck = why is not None
            await asyncio.sleep(STATS_POLL_S)

    async def _start_engine(self) -> AsyncEngineClient:
        level = self._settings.log_level.upper()
        return await AsyncEngineClient.start(self._settings.engine, log_level=level)

    async def _or_stopped(
        self, starting: asyncio.Task[AsyncEngineClient], tokenizer: asyncio.Future[Tokenizer]
    ) -> tuple[AsyncEngineClient, Tokenizer] | None:
        """Both parts, or ``None`` if a signal came first.  What goes wrong with either ends the other."""
        stopping = asyncio.create_task(self._stop.wait())
        loading = asyncio.gather(starting, tokenizer)
        done, _ = await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if loading in done and not loading.cancelled() and loading.exception() is None:
            return loading.result()
        starting.cancel()
        await asyncio.gather(starting, loading, return_exceptions=True)
        if starting.done() and not starting.cancelled() and starting.exception() is None:
            await starting.result().shutdown()
        return loading.result() if loading in done else None

    async def _unless_forced(self, waiting: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(waiting)
        forced = asyncio.create_task(self._force.wait())
        await asyncio.wait((task, forced), return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        forced.cancel()

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("Second signal: ending at once")
            self._force.set()
        self._stop.set()

    def _announce(self, service: Service, engine: AsyncEngineClient) -> None:
        ready = engine.ready
        for note in ready.notes:
            logger.info("%s", note)
        # What was made by now stays: collections need not walk it again.
        gc.collect()
        gc.freeze()
        logger.info(
            "%s on %s (%s, %s), up to %d tokens a request, %d at a time, %d KV blocks of %d; ready after %.1f s",
            service.model_name,
            ready.device_name,
            ready.backend,
            ready.dtype,
            ready.max_model_len,
            ready.max_num_seqs,
            ready.num_blocks,
            ready.block_size,
            time.monotonic() - self._started_s,
        )
        logger.info("Serving on %s", address(self._sock))
        if not service.keys.required and is_reachable(self._sock):
            logger.warning("Whoever reaches this address may use the model: no --api-key is set")
        logger.info("Application startup complete.")
