"""A Chrome trace of an engine's steps: what the host does in each, and when the device works.

Host lanes are timed here.  Device lanes are torch's profiler's where the device has a queue of its
own, and the steps themselves where the machine's own processor computes them.  The engine's objects
are wrapped for as long as the recording lasts, so that nothing is paid for it at other times.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.llm import LLM

HOST_LANES: Final = ("plan", "submit", "collect", "update")
"""In order: the next step is planned, handed to the executor, its results waited for, and taken over."""
DEVICE_LANE: Final = "steps"
HOST_PID, DEVICE_PID = 2_000_000_001, 2_000_000_002  # beside the profiler's: process ids and device numbers
DEVICE_CATEGORIES: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""What torch's profiler calls work on a device, whoever made it."""
LEAST_DECODE_STEPS: Final = 8
"""Steps below which nothing is said of the time in which the engine only decodes."""

Interval: TypeAlias = tuple[float, float]
"""Begin and end, in microseconds from the trace's own origin."""


@dataclass(frozen=True, slots=True)
class _Slice:
    lane: str
    begin_ns: int  # of the system's clock
    end_ns: int
    step: int | None
    tokens: int = 0
    spans: int = 0

    @property
    def decodes(self) -> bool:
        return 0 < self.tokens == self.spans


@dataclass(slots=True)
class Trace:
    """What was recorded; filled in when :func:`tracing` ends."""

    path: Path
    steps: int = 0
    wall_s: float = 0.0
    """From the first submission to the last result."""
    device_busy: float | None = None
    """Share of that time in which the device worked; ``None`` where nothing tells."""
    decode_busy: float | None = None
    """The same after the last step with a span of several tokens; ``None`` with few steps after it."""
    host_s: dict[str, float] = field(default_factory=dict)
    """Seconds in each host lane."""

    def figures(self) -> dict[str, Any]:
        """Of a benchmark's result."""
        return {
            "file": str(self.path),
            "steps": self.steps,
            "wall_s": round(self.wall_s, 6),
            "device_busy": _rounded(self.device_busy),
            "decode_busy": _rounded(self.decode_busy),
            "host_s": {lane: round(spent, 6) for lane, spent in self.host_s.items()},
        }

    def text(self) -> str:
        busy = "nothing tells when its device works"
        if self.device_busy is not None:
            busy = f"device busy {self.device_busy:.1%} of {self.wall_s:.3f} s"
        if self.decode_busy is not None:
            busy += f", {self.decode_busy:.1%} while it only decodes"
        return f"trace of {self.steps} steps in {self.path} (open it in ui.perfetto.dev): {busy}"


@contextmanager
def tracing(llm: LLM, path: Path) -> Iterator[Trace]:
    """Record what ``llm`` does in the block, and write it to ``path`` (compressed if that ends in ``.gz``).

    Not for two recordings at once.  Raises :class:`IsthmusError` at once if ``path`` cannot be written.
    """
    _require_writable(path)
    core: Any = llm._core
    recording = _Recording()
    scheduler, executor = core._scheduler, core._executor
    core._scheduler = _Timed(scheduler, recording, {"plan": "plan", "update": "update"})
    core._executor = _Timed(executor, recording, {"submit": "submit", "collect": "collect"})
    profiler = _Profiler(executor)
    watched = _watch_host_device(executor, recording)
    trace = Trace(path)
    try:
        with profiler:
            yield trace
    finally:
        core._scheduler, core._executor = scheduler, executor
        if watched:
            del executor._launch
    document = profiler.document() or {"traceEvents": [], "baseTimeNanoseconds": recording.began_ns}
    _fill(trace, recording.slices, document)
    _write(path, _joined(document, recording.slices))


class _Recording:
    def __init__(self) -> None:
        self.slices: list[_Slice] = []
        # Durations by the steady clock, places by the system's, which is the profiler's.
        self.began_ns: Final = time.time_ns()
        self._offset_ns: Final = self.began_ns - time.perf_counter_ns()

    def timed(self, lane: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, leaving a slice that is numbered by the plan or the result it takes or gives."""

        def wrapper(*arguments: Any) -> Any:
            begin = time.perf_counter_ns()
            found = None
            try:
                found = call(*arguments)
                return found
            finally:
                end = time.perf_counter_ns()
                about = found if arguments == () else arguments[0]
                self.slices.append(
                    _Slice(
                        lane,
                        begin + self._offset_ns,
                        end + self._offset_ns,
                        getattr(about, "step", None),
                        getattr(about, "num_tokens", 0),
                        getattr(about, "num_spans", 0),
                    )
                )

        return wrapper


class _Timed:
    """An object some of whose methods are timed, each in the lane named."""

    def __init__(self, inner: Any, recording: _Recording, lanes: dict[str, str]) -> None:
        self._inner = inner
        for method, lane in lanes.items():
            setattr(self, method, recording.timed(lane, getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _device_type(executor: Any) -> str:
    """What the core's executor computes on; empty for an executor of a backend's own."""
    backend = getattr(executor, "_backend", None)
    return str(backend.memory.device.type) if backend is not None else ""


def _watch_host_device(executor: Any, recording: _Recording) -> bool:
    """Time the steps where the machine's own processor computes them: they then run within one call."""
    if _device_type(executor) != "cpu" or not hasattr(executor, "_launch"):
        return False
    executor._launch = recording.timed(DEVICE_LANE, executor._launch)
    return True


class _Profiler:
    """torch's profiler of the device alone, where there is one; a context that does nothing elsewhere."""

    def __init__(self, executor: Any) -> None:
        self._profile: Any = None
        if _device_type(executor) in ("", "cpu"):
            return
        from torch.profiler import ProfilerActivity, profile, supported_activities

        known = supported_activities()  # type: ignore[no-untyped-call]
        activities = known - {ProfilerActivity.CPU}
        if activities:
            self._profile = profile(activities=activities)

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)

    def document(self) -> dict[str, Any]:
        """What it exports; empty where there is none."""
        if self._profile is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "device.json"
            self._profile.export_chrome_trace(str(exported))
            document: dict[str, Any] = json.loads(exported.read_text())
        return document


def _joined(document: dict[str, Any], slices: Iterable[_Slice]) -> dict[str, Any]:
    """The profiler's trace with our lanes above its own."""
    base_ns = document.get("baseTimeNanoseconds", 0)
    lanes = {lane: (HOST_PID, number) for number, lane in enumerate(HOST_LANES)} | {DEVICE_LANE: (DEVICE_PID, 0)}
    events, used = document["traceEvents"], set()
    for part in slices:
        pid, tid = lanes[part.lane]
        begin, end = _interval(part, base_ns)
        used.add(part.lane)
        event = {
            "ph": "X",
            "cat": "host" if pid == HOST_PID else "device",
            "name": part.lane if part.step is None else f"{part.lane} {part.step}",
            "pid": pid,
            "tid": tid,
            "ts": begin,
            "dur": end - begin,
            "args": {"step": part.step, "tokens": part.tokens, "spans": part.spans},
        }
        events.append(event)
    for pid, name in ((HOST_PID, "host: the engine's loop"), (DEVICE_PID, "device")):
        if any(lanes[lane][0] == pid for lane in used):
            events.append(_metadata("process_name", pid, 0, name=name))
            events.append(_metadata("process_sort_index", pid, 0, sort_index=pid - DEVICE_PID - 1))
    for lane in used:
        events.append(_metadata("thread_name", *lanes[lane], name=lane))
        events.append(_metadata("thread_sort_index", *lanes[lane], sort_index=lanes[lane][1]))
    document["displayTimeUnit"] = "ms"
    return document


def _metadata(kind: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": arguments}


def _fill(trace: Trace, slices: list[_Slice], document: dict[str, Any]) -> None:
    submits = [part for part in slices if part.lane == "submit"]
    collects = [part for part in slices if part.lane == "collect"]
    trace.steps = len(collects)
    trace.host_s = {
        lane: sum(part.end_ns - part.begin_ns for part in slices if part.lane == lane) / 1e9 for lane in HOST_LANES
    }
    if not submits or not collects:
        return
    base_ns = document.get("baseTimeNanoseconds", 0)
    begin, end = _interval(submits[0], base_ns)[0], _interval(collects[-1], base_ns)[1]
    trace.wall_s = (end - begin) / 1e6
    work = [*_profiled(document), *(_interval(part, base_ns) for part in slices if part.lane == DEVICE_LANE)]
    if not work:
        return
    trace.device_busy = busy_share(work, begin, end)
    last_long = max((part.step or 0 for part in submits if not part.decodes), default=-1)
    after = [part for part in collects if (part.step or 0) >= last_long]
    if len(after) > LEAST_DECODE_STEPS:
        trace.decode_busy = busy_share(work, _interval(after[0], base_ns)[1], end)


def _interval(part: _Slice, base_ns: int) -> Interval:
    return (part.begin_ns - base_ns) / 1e3, (part.end_ns - base_ns) / 1e3


def _profiled(document: dict[str, Any]) -> Iterator[Interval]:
    for event in document["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in DEVICE_CATEGORIES:
            yield event["ts"], event["ts"] + event["dur"]


def busy_share(work: Iterable[Interval], begin: float, end: float) -> float:
    """Share of ``begin ... end`` that some interval of ``work`` covers; they may overlap."""
    covered, reached = 0.0, begin
    for start, stop in sorted(work):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            covered += stop - start
            reached = stop
    return covered / (end - begin) if end > begin else 0.0


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _require_writable(path: Path) -> None:
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise IsthmusError(f"the trace cannot be written to {path}; name a file in a folder that is there and writable")


def _write(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document)
    try:
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode(), 5))
        else:
            path.write_text(text)
    except OSError as error:
        raise IsthmusError(f"cannot write the trace {path}: {error.strerror}") from error
