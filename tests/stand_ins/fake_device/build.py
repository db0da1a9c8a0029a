"""Builds the device once for each PyTorch and source, into the user's cache.

A plain call of the C++ compiler: neither ninja nor Python's headers are needed.  ``python -m fake_device.build`` does
so ahead of the first use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE: Final = Path(__file__).with_name("device.cpp")
FLAGS: Final = ("-std=c++20", "-O1", "-g0", "-w", "-fPIC", "-shared")
LIBRARIES: Final = ("-ltorch_cpu", "-ltorch", "-lc10")
TIMEOUT_S: Final = 600


def library() -> Path:
    """The shared library, built if it is not there yet; a second process waits for the first.

    Raises :class:`RuntimeError` where there is no C++ compiler or it fails.
    """
    folder = cache_folder()
    built = folder / f"fake_device-{_key()}.so"
    if built.exists():
        return built
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(built)
    return built


def cache_folder() -> Path:
    """``$ISTHMUS_CACHE/fake_device`` where it is set, else ``fake_device`` in Isthmus's folder of the user's cache."""
    asked = os.environ.get("ISTHMUS_CACHE")
    base = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"
    folder = base / "fake_device"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _key() -> str:
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (torch.__version__, platform.machine(), *FLAGS):
        digest.update(part.encode())
    return digest.hexdigest()[:24]


def _build(library: Path) -> None:
    asked = os.environ.get("CXX")
    compiler = next((name for name in (asked,) if name), None) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the fake device needs a C++20 compiler (Debian and Ubuntu: apt install g++), found none")
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    paths = [part for path in library_paths() for part in ("-L", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *FLAGS, abi, *includes, str(SOURCE), "-o", str(made), *paths, *LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the fake device could not be compiled by {compiler}:\n{done.stderr[-4000:]}")
        made.replace(library)


if __name__ == "__main__":
    print(f"fake device: {library()}")
