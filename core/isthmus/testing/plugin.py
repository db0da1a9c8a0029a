"""The certification kit's side of pytest: options, markers, and the device under test.

Loaded by pytest wherever Isthmus is installed, so that it imports neither torch nor a backend until
a test asks for :func:`isthmus_device`.

    pytest --pyargs isthmus.testing.suite --isthmus-device=NAME

A test of the kit, or a vendor's own, names what it needs::

    @pytest.mark.requires_capability("sliding_window")
    def test_windows(isthmus_device): ...
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from isthmus.testing.device import DeviceUnderTest

UNDECLARED: Final = "undeclared: "
"""How the reason begins for which a test of the kit may be skipped; any other skip is a failure."""
SUITE: Final = "isthmus.testing.suite"
REFUSED: Final = 3
"""Exit status where the device could not be opened."""
MARKERS: Final = (
    "requires_capability(*names): skip unless the device's capabilities declare each of these",
    "requires_parts: skip for a backend that has no parts, because it runs whole steps by itself",
    "mandatory: part of the core that no backend may do without; a skip is a failure",
    "closes_device: runs after all others, since the device is closed in it",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("isthmus", "Isthmus certification kit")
    group.addoption("--isthmus-device", metavar="NAME", help="backend to test, as `isthmus backends` names it")
    group.addoption(
        "--isthmus-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the backend; repeat",
    )
    group.addoption("--isthmus-report", metavar="FILE", help="append one line of JSON for each test of the kit")
    group.addoption(
        "--isthmus-model",
        metavar="PATH",
        help="model for a backend that loads models by itself (default: a tiny one with random weights)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if path := config.getoption("--isthmus-report"):
        config.pluginmanager.register(Recorder(Path(path)), "isthmus-recorder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("closes_device") is not None)


@pytest.fixture(scope="session")
def isthmus_device(request: pytest.FixtureRequest) -> Iterator[DeviceUnderTest]:
    """The device that ``--isthmus-device`` names, opened once and closed at the end."""
    name = request.config.getoption("--isthmus-device")
    if not name:
        raise pytest.UsageError("say which backend to test: --isthmus-device=NAME (`isthmus backends` lists them)")
    from isthmus.errors import IsthmusError
    from isthmus.testing.device import DeviceUnderTest

    settings = dict(setting.partition("=")[::2] for setting in request.config.getoption("--isthmus-option"))
    try:
        device = DeviceUnderTest.open(name, settings, request.config.getoption("--isthmus-model"))
    except IsthmusError as error:
        if recorder := request.config.pluginmanager.get_plugin("isthmus-recorder"):
            recorder.write(event="refused", message=str(error))
        pytest.exit(str(error), returncode=REFUSED)
    yield device
    device.close()


@pytest.fixture(autouse=True)
def _isthmus_requirements(request: pytest.FixtureRequest) -> None:
    """Skip what the device does not declare."""
    needs = [name for marker in request.node.iter_markers("requires_capability") for name in marker.args]
    parts = request.node.get_closest_marker("requires_parts") is not None
    if not (needs or parts):
        return
    device: DeviceUnderTest = request.getfixturevalue("isthmus_device")
    if parts and not device.has_parts:
        pytest.skip(f"{UNDECLARED}parts (the backend runs whole steps by itself)")
    missing = [name for name in needs if not device.declares(name)]
    if missing:
        pytest.skip(UNDECLARED + ", ".join(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Turn a skip that the capabilities do not account for into a failure."""
    report = yield
    if report.skipped and _of_suite(item) and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        allowed = UNDECLARED in reason and (_is_about_parts(reason) or item.get_closest_marker("mandatory") is None)
        if not allowed:
            report.outcome = "failed"
            report.longrepr = f"this test may not be skipped: {reason}"
    return report


class Recorder:
    """Writes what happens as it happens, so that the last line tells where a process died."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **event: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(event="collected", count=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(event="begin", test=nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            mandatory = "mandatory" in report.keywords
            self.write(
                event="end",
                test=report.nodeid,
                outcome=report.outcome,
                reason="" if report.outcome == "passed" else one_line(report),
                mandatory=mandatory,
                seconds=round(report.duration, 3),
            )


def one_line(report: pytest.TestReport) -> str:
    """Why, without the traceback."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):
        text = str(longrepr[2])
    else:
        crash = getattr(longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(longrepr)
    # pytest adds what it knows of an assert's operands below the message.
    return " ".join(text.split("\nassert ")[0].split())


def _of_suite(item: pytest.Item) -> bool:
    module = getattr(item, "module", None)
    return module is not None and module.__name__.startswith(SUITE)


def _is_about_parts(reason: str) -> bool:
    return f"{UNDECLARED}parts" in reason
