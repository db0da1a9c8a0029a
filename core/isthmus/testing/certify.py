"""Runs the certification kit in a process of its own and says what it found.

A backend may end the process that it runs in; the report then says in which test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.contract import CONTRACT_VERSION
from isthmus.errors import IsthmusError
from isthmus.testing.plugin import REFUSED, SUITE, UNDECLARED
from isthmus.version import __version__

POLL_S: Final = 0.1
SHOWN: Final = 20
"""Failures that the text tells of; JSON has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """``what`` names the shape or the property; ``repeat`` is the command that runs this test alone."""

    test: str
    what: str
    repeat: str


@dataclass(slots=True, kw_only=True)
class Report:
    device: str
    collected: int = 0
    passed: list[str] = field(default_factory=list)
    undeclared: dict[str, list[str]] = field(default_factory=dict)
    """By capability: the tests that were skipped for it."""
    failures: list[Failure] = field(default_factory=list)
    mandatory_passed: int = 0
    whole: bool = True
    """Whether the whole kit was asked for."""
    refused: str = ""
    """Why the device could not be opened."""
    died: str = ""
    """How the process ended before the kit did."""
    seconds: float = 0.0

    @property
    def certified(self) -> bool:
        done = len(self.passed) + sum(map(len, self.undeclared.values()))
        sound = not (self.failures or self.refused or self.died)
        return sound and self.whole and self.mandatory_passed > 0 and done == self.collected

    def verdict(self) -> str:
        against = f"Isthmus {__version__}, contract {CONTRACT_VERSION}"
        if self.refused:
            return f"NOT CERTIFIED: {self.refused}"
        if self.certified:
            return f"CERTIFIED: {self.device} passed {len(self.passed)} tests in {self.seconds:.0f} s ({against})"
        if not self.whole and not self.failures and not self.died:
            return f"passed {len(self.passed)} tests; only the whole kit certifies ({against})"
        return f"NOT CERTIFIED: {self.device}, {len(self.failures)} of {self.collected} tests failed ({against})"

    def text(self) -> str:
        """For a person: parts, what is undeclared, what failed and how to repeat it, and the verdict last."""
        return "\n".join([*self._parts(), *self._undeclared(), *self._failed(), self.verdict()])

    def to_json(self) -> str:
        return json.dumps({"certified": self.certified, "verdict": self.verdict(), **asdict(self)}, indent=2)

    def _parts(self) -> list[str]:
        failed = [failure.test for failure in self.failures]
        skipped = [test for tests in self.undeclared.values() for test in tests]
        names = dict.fromkeys(part_of(test) for test in [*self.passed, *skipped, *failed])
        if not names:
            return []
        lines = [f"{'part':<14}{'certified':>10}{'undeclared':>12}{'failed':>8}"]
        for name in sorted(names):
            counts = [sum(part_of(test) == name for test in tests) for tests in (self.passed, skipped, failed)]
            lines.append(f"{name:<14}{counts[0]:>10}{counts[1]:>12}{counts[2]:>8}")
        return [*lines, ""]

    def _undeclared(self) -> list[str]:
        if not self.undeclared:
            return []
        lines = [f"  {name} ({len(tests)} tests)" for name, tests in sorted(self.undeclared.items())]
        return ["undeclared, so not tested:", *lines, ""]

    def _failed(self) -> list[str]:
        lines = [f"the process died: {self.died}", ""] if self.died else []
        for failure in self.failures[:SHOWN]:
            lines += [f"FAILED {failure.test}", f"  {failure.what}", f"  repeat: {failure.repeat}", ""]
        if len(self.failures) > SHOWN:
            lines += [f"and {len(self.failures) - SHOWN} more; --json lists them all", ""]
        return lines


def part_of(test: str) -> str:
    return test.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")


def certify(
    device: str,
    settings: Mapping[str, str] | None = None,
    *,
    model: str | None = None,
    select: str | None = None,
    progress: Callable[[str, str], None] = lambda test, outcome: None,
) -> Report:
    """Run the kit on backend ``device`` opened with ``settings``.

    ``model`` is for a backend that loads models by itself; ``select`` is a pytest ``-k`` expression,
    with which nothing is certified.  ``progress`` is told of each test as it ends.  Raises
    :class:`IsthmusError` where pytest is missing or the kit could not start.
    """
    if importlib.util.find_spec("pytest") is None:
        raise IsthmusError("the certification kit runs under pytest, which is not installed; try: pip install pytest")
    asked = [f"--isthmus-device={device}", *(f"--isthmus-option={k}={v}" for k, v in (settings or {}).items())]
    asked += [f"--isthmus-model={model}"] if model else []
    report = Report(device=device, whole=select is None)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="isthmus-certify-") as folder:
        run = _Run(report, asked, Path(folder), progress)
        run.follow(run.start(["-k", select] if select else []))
    report.seconds = time.monotonic() - began
    return report


@dataclass(slots=True)
class _Run:
    """One pytest process, and the report that it fills."""

    report: Report
    asked: list[str]
    folder: Path
    progress: Callable[[str, str], None]
    running: str = ""
    read: int = 0
    ended: set[str] = field(default_factory=set)

    def start(self, more: list[str]) -> subprocess.Popen[bytes]:
        # Neither the caller's own pytest settings nor other plugins have a say.
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        # The kit measures what an engine gives back: glibc would keep some of that for each thread there ever was.
        environment.setdefault("MALLOC_ARENA_MAX", "1")
        suite = importlib.util.find_spec(SUITE)
        assert suite is not None and suite.origin is not None
        command = [
            *(sys.executable, "-m", "pytest", "--pyargs", SUITE, "-p", "isthmus.testing.plugin"),
            *("-c", os.devnull, f"--rootdir={Path(suite.origin).parent}", "--import-mode=importlib"),
            # And pytest would keep every record that a compiler logs.
            *("-p", "no:cacheprovider", "-p", "no:logging", "-q", "--no-header", f"--isthmus-report={self._events}"),
            *(f"--basetemp={self.folder / 'tmp'}", *self.asked, *more),
        ]
        with self._output.open("wb") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def _events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def _output(self) -> Path:
        return self.folder / "output.txt"

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                self._read_events()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._read_events()
        self._check_end(process.returncode)

    def _check_end(self, status: int) -> None:
        report = self.report
        if report.refused and status == REFUSED:
            return
        if self.running:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            report.died = f"{how} in {self.running}"
            report.failures.append(self._failure(self.running, report.died))
        elif status not in (0, 1):
            tail = " ".join(self._output.read_text(errors="replace").split("\n")[-12:])
            raise IsthmusError(f"the kit could not run (pytest's exit status {status}): {' '.join(tail.split())}")

    def _read_events(self) -> None:
        if not self._events.exists():
            return
        with self._events.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        report = self.report
        match event["event"]:
            case "collected":
                report.collected = event["count"]
            case "refused":
                report.refused, self.running = event["message"], ""
            case "begin":
                self.running = event["test"]
            case "end":
                self._end(event)

    def _end(self, event: dict[str, Any]) -> None:
        test, outcome, report = event["test"], event["outcome"], self.report
        self.running = ""
        if test in self.ended:  # a teardown that failed after its test
            report.passed = [passed for passed in report.passed if passed != test]
        self.ended.add(test)
        if outcome == "passed":
            report.passed.append(test)
            report.mandatory_passed += event["mandatory"]
        elif outcome == "skipped":
            reason = event["reason"].partition(UNDECLARED)[2]
            report.undeclared.setdefault(reason, []).append(test)
        else:
            report.failures.append(self._failure(test, event["reason"]))
        self.progress(test, outcome)

    def _failure(self, test: str, what: str) -> Failure:
        file, _, name = test.partition("::")
        target = f"{SUITE}.{file.removesuffix('.py')}::{name}"
        return Failure(test=test, what=what, repeat=f"pytest --pyargs '{target}' {' '.join(self.asked)}")
