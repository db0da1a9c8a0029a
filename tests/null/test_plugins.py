"""Backends are found and opened by name; whatever a plugin does wrong ends in one line that says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus import plugins
from isthmus.contract import CONTRACT_VERSION, Capabilities
from isthmus.errors import BackendError, BackendNotFound, BackendUnavailable, ContractMismatch
from isthmus.plugins import find_backend, list_backends, load_plugin, open_backend, select_backend

Install = Callable[..., str]

HEADER = f"""
from isthmus.contract import Capabilities, DeviceInfo
from isthmus.hookspecs import hookimpl
CONTRACT_VERSION = {tuple(CONTRACT_VERSION)!r}
"""

GOOD = """
class Backend:
    name = "made-up"
    capabilities = Capabilities(block_sizes=(32,))
    closed = 0
    def __init__(self, device): self.device = device
    def create_executor(self, options): return None
    def providers(self): return {}
    def close(self): type(self).closed += 1
@hookimpl
def isthmus_probe():
    return [DeviceInfo(backend="made-up", index=index, name=name) for index, name in ((0, "zero"), (3, "three"))]
@hookimpl
def isthmus_open(device, options): return Backend(device)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a plugin on the path as an installed distribution would be."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = iter(range(100))

    def install(source: str, name: str = "made-up", distribution: str = "made-up-plugin", extra: str = "") -> str:
        module = f"made_up_{tmp_path.name}_{next(made)}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        extras = f"Provides-Extra: {extra}\n" if extra else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n{extras}")
        (info / "entry_points.txt").write_text(f"[isthmus.backends]\n{name} = {module}\n")
        return module

    return install


def only_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the backends of this repository out of what is installed."""
    everything = plugins.installed_backends
    monkeypatch.setattr(
        plugins, "installed_backends", lambda: [b for b in everything() if b.distribution != "isthmus-engine"]
    )


def message(kind: type[BackendError], name: str = "made-up") -> str:
    with pytest.raises(kind) as raised:
        open_backend(name, {})
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_good_plugin_opens_on_the_device_asked_for(install: Install) -> None:
    install(HEADER + GOOD)
    assert open_backend("made-up", {}).device.name == "zero"
    assert open_backend("made-up:3", {}).device.name == "three"
    assert "made-up:0, made-up:3" in message(BackendUnavailable, "made-up:1")


def test_only_the_named_plugin_is_imported(install: Install) -> None:
    other = install("raise SystemExit(3)", name="other", distribution="other-plugin")
    mine = install(HEADER + GOOD)
    open_backend("made-up", {})
    assert mine in sys.modules and other not in sys.modules


def test_no_plugin_of_the_name(install: Install) -> None:
    install(HEADER + GOOD)
    assert "did you mean 'made-up'" in message(BackendNotFound, "made-upp")


def test_two_plugins_of_one_name_are_both_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(HEADER + GOOD)
    install(HEADER + GOOD, distribution="rival-plugin")
    text = message(BackendError)
    assert "made-up-plugin 1.2" in text and "rival-plugin 1.2" in text and "uninstall one" in text
    only_made_up(monkeypatch)
    [status] = list_backends()
    assert status.name == "made-up" and status.reason == text


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        (
            "import no_such_sdk",
            BackendUnavailable,
            "No module named 'no_such_sdk'; try: reinstall",
        ),
        ("raise RuntimeError('first\\nsecond')", BackendUnavailable, "RuntimeError: first second"),
        ("raise SystemExit(3)", BackendUnavailable, "SystemExit: 3"),
        ("this is no python", BackendUnavailable, "SyntaxError"),
        ("", ContractMismatch, "states no CONTRACT_VERSION; upgrade made-up-plugin"),
        ("CONTRACT_VERSION = '1.0'", ContractMismatch, "it must be (major, minor)"),
        ("CONTRACT_VERSION = (99, 0)", ContractMismatch, "written for contract 99.0"),
        (
            HEADER + "CONTRACT_VERSION = (0, 1)\n@hookimpl\ndef isthmus_probe(old): pass",
            ContractMismatch,
            "written for contract 0.1",
        ),
        (HEADER + "@hookimpl\ndef isthmus_probe(surplus): pass", BackendError, "breaks the contract"),
        (HEADER + "@hookimpl\ndef isthmus_prob(): pass", BackendError, "isthmus_prob"),
        (HEADER, BackendError, "does not implement isthmus_probe"),
        (HEADER + "@hookimpl\ndef isthmus_probe(): pass", BackendError, "isthmus_probe returned None"),
        (HEADER + "@hookimpl\ndef isthmus_probe(): return 'gpu'", BackendError, "returned str, not a list"),
        (HEADER + "@hookimpl\ndef isthmus_probe(): return []", BackendUnavailable, "sees no device"),
        (HEADER + "@hookimpl\ndef isthmus_probe(): 1 / 0", BackendUnavailable, "isthmus_probe failed: ZeroDivision"),
        (HEADER + "@hookimpl\ndef isthmus_probe(): raise SystemExit", BackendUnavailable, "isthmus_probe failed"),
    ],
)
def test_misbehaviour_is_one_line(install: Install, source: str, kind: type[BackendError], says: str) -> None:
    install(source)
    assert says in message(kind)


SLEEPS = "import time; time.sleep(60)"
PROBE = HEADER + "@hookimpl\ndef isthmus_probe(): return [DeviceInfo(backend='made-up', index=0, name='zero')]\n"


@pytest.mark.parametrize(
    ("opening", "says"),
    [
        ("", "does not implement isthmus_open"),
        ("@hookimpl\ndef isthmus_open(device, options): pass", "isthmus_open returned None"),
        ("@hookimpl\ndef isthmus_open(device, options): return 3", "returned a int that lacks"),
        ("@hookimpl\ndef isthmus_open(device, options): raise OSError('no driver')", "failed: OSError: no driver"),
        (
            "from isthmus.errors import BackendError\n@hookimpl\ndef isthmus_open(device, options):\n"
            "  raise BackendError('no option')",
            "no option",
        ),
    ],
)
def test_misbehaviour_while_opening_is_one_line(install: Install, opening: str, says: str) -> None:
    install(PROBE + opening)
    with pytest.raises(BackendError) as raised:
        open_backend("made-up", {})
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_plugin_cannot_change_the_options(install: Install) -> None:
    install(HEADER + GOOD.replace("return Backend(device)", "options.clear(); return Backend(device)"))
    options = {"kept": "yes"}
    open_backend("made-up", options)
    assert options == {"kept": "yes"}


def test_an_import_error_names_the_extra_that_would_help(install: Install) -> None:
    install("import no_such_sdk", extra="made-up")
    assert "pip install 'made-up-plugin[made-up]'" in message(BackendUnavailable)


@pytest.mark.parametrize("hangs", [SLEEPS, PROBE.replace("return [", f"{SLEEPS}; return [")])
def test_a_hanging_plugin_is_given_up(install: Install, hangs: str) -> None:
    install(hangs)
    begun = time.monotonic()
    with pytest.raises(BackendUnavailable, match="did not answer its probe"):
        select_backend("made-up", deadline_s=0.1)
    assert time.monotonic() - begun < 5


def test_auto_prefers_any_device_to_the_host_and_says_why_others_were_passed_over(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = GOOD.replace("name=name", "name=name, host=True")
    by_name = GOOD.replace("name=name", "name=name, auto=False")
    only_made_up(monkeypatch)
    install(HEADER + by_name, name="by-name", distribution="a-plugin")
    assert "'by-name' has to be asked for by name" in message(BackendUnavailable, "auto")
    install(HEADER + host, name="host", distribution="b-plugin")
    assert select_backend("auto").plugin.installed.name == "host"
    install("import no_such_sdk", name="broken", distribution="c-plugin")
    install(HEADER + GOOD, name="device", distribution="z-plugin")
    selection = select_backend("auto")
    assert selection.plugin.installed.name == "device"
    asked, broken = selection.passed_over
    assert "'by-name' has to be asked for by name" in asked and "no_such_sdk" in broken


def test_the_list_shows_capabilities_or_the_reason(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    only_made_up(monkeypatch)
    hook = "\n@hookimpl\ndef isthmus_capabilities(device): return Capabilities(block_sizes=(64,))"
    opened = install(HEADER + GOOD, name="opened", distribution="a-plugin")
    install(HEADER + GOOD + hook, name="asked", distribution="b-plugin")
    install("import no_such_sdk", name="broken", distribution="c-plugin")
    statuses = {status.name: status for status in list_backends()}
    assert statuses["opened"].capabilities == Capabilities(block_sizes=(32,))
    assert sys.modules[opened].Backend.closed == 1
    assert statuses["asked"].capabilities == Capabilities(block_sizes=(64,))
    assert [device.name for device in statuses["asked"].devices] == ["zero", "three"]
    assert "no_such_sdk" in statuses["broken"].reason and statuses["broken"].distribution == "c-plugin 1.2"


def test_the_null_backend_is_never_chosen_and_imports_no_torch() -> None:
    installed = find_backend("null")
    assert not any(device.auto for device in load_plugin(installed).probe())
    code = (
        "import sys; from isthmus.plugins import open_backend; open_backend('null', {}); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize(("options", "says"), [({"speed": "1"}, "no option 'speed'"), ({"step_s": "x"}, "a number")])
def test_the_null_backend_refuses_options_it_does_not_know(options: dict[str, str], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        open_backend("null", options)
