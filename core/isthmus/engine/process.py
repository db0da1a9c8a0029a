"""The engine process: ``python -m isthmus.engine.process``, started by a client and bound to its life.

The main thread runs the engine loop.  It reads its socket between steps and sleeps in a poll when
there is nothing to do (ZeroMQ's own threads move the bytes meanwhile), so a request costs the loop
only its decoding.  A second thread sends a heartbeat each second, also while a step runs; a third
waits for the client to go.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import struct
import sys
import threading
import time
from typing import BinaryIO, Final

import msgspec
import zmq

from isthmus.engine.core import EngineCore, describe
from isthmus.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStart,
    EngineStats,
    FromEngine,
    Outputs,
    RequestRefused,
    Shutdown,
    ToEngine,
    Wire,
)
from isthmus.errors import EngineDead, InvalidRequest, IsthmusError, QueueFull

logger = logging.getLogger("isthmus.engine.process")  # __name__ is "__main__" here

HEARTBEAT_S: Final = 1.0
STATS_EVERY_S: Final = 0.1
STALL_POLL_S: Final = 0.02
LAST_WORDS_S: Final = 2.0
"""How long the last message may take to leave."""

_PR_SET_PDEATHSIG: Final = 1


class Outlet:
    """The sending end of one thread's socket to the client."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.sndhwm = Wire.QUEUED_OUTPUTS
        self._socket.linger = 0
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromEngine, *, wait: bool = True) -> None:
        """Hand over a message.  A client that does not read holds the engine back, never its memory;
        with ``wait`` off the message is dropped instead."""
        try:
            self._socket.send(self._encoder.encode(message), 0 if wait else zmq.NOBLOCK)
        except zmq.Again:
            logger.debug("the client does not read; a heartbeat was dropped")

    def close(self) -> None:
        self._socket.close(linger=0)


class Inlet:
    """The engine's listening socket.  What cannot be decoded is logged and dropped."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.rcvhwm = Wire.QUEUED_REQUESTS
        self._socket.maxmsgsize = int(Wire.MAX_MESSAGE_BYTES)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def wait(self, timeout_s: float | None = None) -> None:
        self._socket.poll(None if timeout_s is None else int(timeout_s * 1000))

    def read(self) -> list[ToEngine]:
        """All that has arrived, without waiting."""
        messages: list[ToEngine] = []
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                if len(frames) != 1:
                    raise ValueError(f"{len(frames)} frames where one was due")
                messages.append(self._decoder.decode(frames[0]))
            # A bound checked in a struct's own constructor may raise one of our errors.
            except (ValueError, IsthmusError) as error:
                logger.warning("dropped a malformed message of %d bytes: %s", sum(map(len, frames)), describe(error))
        return messages

    def close(self) -> None:
        self._socket.close(linger=0)


class Heartbeat:
    """Repeats the loop's last snapshot each second, from a thread of its own.

    The loop being stuck then shows as an old ``last_progress_s`` under a fresh ``monotonic_s``.
    """

    def __init__(self, outlet: Outlet, first: EngineStats) -> None:
        self._outlet = outlet
        self._snapshot = first
        self._idle = True
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="isthmus-heartbeat", daemon=True)
        self._thread.start()

    def publish(self, snapshot: EngineStats, *, idle: bool) -> None:
        """Called by the loop, with what it last sent itself."""
        self._snapshot = snapshot
        self._idle = idle

    def wake(self) -> None:
        """Called by the loop when there may be work again: time spent idle is no lack of progress."""
        self._snapshot = msgspec.structs.replace(self._snapshot, last_progress_s=time.monotonic())
        self._idle = False

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._outlet.close()

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            snapshot, now = self._snapshot, time.monotonic()
            # Sizes of steps were sent by the loop; a repetition would count them twice.
            repeated = msgspec.structs.replace(
                snapshot,
                monotonic_s=now,
                last_progress_s=now if self._idle else snapshot.last_progress_s,
                step_tokens=(),
            )
            self._outlet.send(repeated, wait=False)


class EngineLoop:
    """Moves messages between the client and an :class:`EngineCore` until told to end."""

    def __init__(self, core: EngineCore, inlet: Inlet, outlet: Outlet, heartbeat: Heartbeat) -> None:
        self._core = core
        self._inlet = inlet
        self._outlet = outlet
        self._heartbeat = heartbeat
        self._next_stats_s = 0.0

    def run(self) -> None:
        """Returns after :class:`Shutdown`.  Raises :class:`EngineDead` when the device keeps failing."""
        core, inlet = self._core, self._inlet
        while self._handle(inlet.read()):
            if not core.has_work:
                self._report(idle=True)
                inlet.wait()
                self._heartbeat.wake()
                continue
            outputs = core.step()
            if outputs:
                self._outlet.send(Outputs(items=tuple(outputs)))
            elif core.stalled:
                # Nothing can run now: do not spin, and let the old time of progress tell.
                inlet.wait(STALL_POLL_S)
            if time.monotonic() >= self._next_stats_s:
                self._report(idle=False)

    def _report(self, *, idle: bool) -> None:
        snapshot = self._core.stats()
        self._next_stats_s = snapshot.monotonic_s + STATS_EVERY_S
        self._heartbeat.publish(snapshot, idle=idle)
        self._outlet.send(snapshot)

    def _handle(self, messages: list[ToEngine]) -> bool:
        for message in messages:
            match message:
                case AddRequest():
                    self._add(message)
                case AbortRequests():
                    self._core.abort(message.request_ids)
                case Shutdown():
                    return False
        return True

    def _add(self, request: AddRequest) -> None:
        try:
            self._core.add(request)
        except InvalidRequest as error:
            refused = RequestRefused(request_id=request.request_id, message=str(error), param=error.param)
        except QueueFull as error:
            refused = RequestRefused(request_id=request.request_id, message=str(error), queue_full=True)
        except Exception as error:
            # One bad request may end itself, never its neighbours.
            logger.exception("request %d could not be added", request.request_id)
            refused = RequestRefused(request_id=request.request_id, message=describe(error))
        else:
            return
        self._outlet.send(refused)


def serve(start: EngineStart) -> int:
    """Build the engine, say that it is ready, run it; the process's exit status."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outlet = Outlet(context, start.from_engine)
    try:
        core, ready = _build(start)
        _run(context, start, core, ready, outlet)
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, IsthmusError) else EngineDead.__name__
        if not isinstance(error, IsthmusError):
            logger.exception("the engine failed")
        message = str(error) if isinstance(error, IsthmusError) else describe(error)
        outlet.send(EngineFailed(message=message, kind=kind), wait=False)
        return 1
    finally:
        # Waits until the last message has left, which the process's end would not.
        context.destroy(linger=int(LAST_WORDS_S * 1000))
    return 0


def _build(start: EngineStart) -> tuple[EngineCore, EngineReady]:
    from isthmus.engine.build import build_engine

    return build_engine(start.options, progress=start.progress)


def _run(
    context: zmq.Context[zmq.Socket[bytes]], start: EngineStart, core: EngineCore, ready: EngineReady, outlet: Outlet
) -> None:
    inlet = Inlet(context, start.to_engine)
    heartbeat = Heartbeat(Outlet(context, start.from_engine), core.stats())
    # What was built lives as long as the process: collections need not walk it again.
    gc.collect()
    gc.freeze()
    outlet.send(ready)
    try:
        EngineLoop(core, inlet, outlet, heartbeat).run()
    finally:
        heartbeat.close()
        inlet.close()
        core.close()


def die_with_parent(parent_pid: int, pipe: BinaryIO) -> None:
    """End this process when its parent ends, whatever it is doing then.

    The kernel's signal reaches a thread inside a driver call; the pipe serves systems without it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)

    def watch() -> None:
        pipe.read(1)
        os._exit(1)

    threading.Thread(target=watch, name="isthmus-parent", daemon=True).start()


def read_start(pipe: BinaryIO) -> EngineStart:
    (length,) = struct.unpack("<I", pipe.read(4))
    return msgspec.msgpack.decode(pipe.read(length), type=EngineStart)


def main() -> int:
    # The client decides when to end.  What is sent to the whole group, as Ctrl-C and a service manager's
    # SIGTERM are, reaches this process too, and must not cut the streams that a drain would finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = sys.stdin.buffer
    start = read_start(pipe)
    die_with_parent(start.parent_pid, pipe)
    logging.basicConfig(
        level=start.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s"
    )
    status = serve(start)
    logging.shutdown()
    # Threads left in a driver must not keep the process.
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
