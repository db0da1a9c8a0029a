"""Opening the CPU backend: its options, building its kernels, and doing without them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus_cpu
from isthmus.contract import GraphScope
from isthmus.errors import BackendError, BackendUnavailable
from isthmus.plugins import select_backend
from isthmus_cpu import build, machine
from isthmus_cpu.machine import usable_cores
from isthmus_cpu.options import CpuOptions, KernelUse


def test_options() -> None:
    assert CpuOptions.parse({}) == CpuOptions(kernels=KernelUse.AUTO, threads=usable_cores())
    assert CpuOptions.parse({"kernels": "off", "threads": "3"}) == CpuOptions(kernels=KernelUse.OFF, threads=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel": "off"}, "no option 'kernel'"),
        ({"kernels": "yes"}, "auto, off, require"),
        ({"threads": "0"}, "1 to 1024"),
        ({"threads": "two"}, "1 to 1024"),
    ],
)
def test_bad_options(options: dict[str, str], said: str) -> None:
    with pytest.raises(BackendError, match=said):
        select_backend("cpu").open(options)


def test_probe_imports_no_torch() -> None:
    code = "import sys, isthmus_cpu; print(isthmus_cpu.isthmus_probe()[0].name); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_plain_path_says_so() -> None:
    backend = select_backend("cpu").open({"kernels": "off"})
    try:
        assert "kernels=off" in backend.providers()["ops"]
        assert backend.capabilities.graph_scope is GraphScope.NONE
    finally:
        backend.close()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_plain_torch_serves(caplog: pytest.LogCaptureFixture) -> None:
    backend = select_backend("cpu").open({})
    backend.close()
    assert backend.capabilities.graph_scope is GraphScope.NONE
    (record,) = caplog.records
    assert "no C++ compiler" in record.message and "apt install g++" in record.message
    assert "no C++ compiler" in backend.providers()["ops"]


@pytest.mark.usefixtures("no_compiler")
def test_required_kernels_without_a_compiler_are_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="no C\\+\\+ compiler"):
        select_backend("cpu").open({"kernels": "require"})


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = 'case "$*" in *-c*) echo "x.cpp:1: error: no such thing" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BackendUnavailable, match="error: no such thing"):
        build.kernels_library()
    assert list((tmp_path / "cache" / "isthmus" / "cpu").iterdir()) == []


def test_building_is_done_once_in_a_folder_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f'echo "$*" >>{log}; while [ $# -gt 1 ]; do [ "$1" = -o ] && : >"$2"; shift; done; exit 0'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = build.kernels_library()
    assert first.exists() and stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    compiled = log.read_text().count("-shared")
    assert build.kernels_library() == first
    assert log.read_text().count("-shared") == compiled == 1


def test_a_library_of_other_sources_is_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "exit 0")))
    sources = tmp_path / "kernels"
    sources.mkdir()
    monkeypatch.setattr(build, "SOURCES", sources)
    keys = set()
    for text in ("int a;", "int b;"):
        (sources / "one.cpp").write_text(text)
        keys.add(build._key(os.environ["CXX"]))
    assert len(keys) == 2


def test_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PROCESSORS", tmp_path)
    monkeypatch.setattr(machine, "_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 6, 7}, raising=False)
    for processor, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 6: "2,6"}.items():
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert usable_cores() == 4  # cpu 7 does not say, and counts alone
    monkeypatch.setattr(machine, "_quota", lambda: 1.5)
    assert usable_cores() == 2


def test_the_contract_is_stated() -> None:
    assert isthmus_cpu.CONTRACT_VERSION == (1, 0)
