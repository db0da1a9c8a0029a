"""Builds the kernels for this very processor, once, into the user's cache.

``python -m isthmus_cpu.build`` does so ahead of the first use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from isthmus.errors import BackendUnavailable
from isthmus_cpu.machine import processor_flags, processor_name, usable_cores

SOURCES: Final = Path(__file__).parent / "kernels"
FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread")
NATIVE: Final = ("-march=native", "-mcpu=native")
"""The first that the compiler takes: its name for "this processor" differs by architecture."""
TIMEOUT_S: Final = 120
REMEDY: Final = "install a C++17 compiler (Debian and Ubuntu: apt install g++; macOS: xcode-select --install)"


def kernels_library() -> Path:
    """The shared library, built if it is not there yet.

    Raises :class:`BackendUnavailable` where there is no compiler or it fails.
    """
    if os.name != "posix":
        raise BackendUnavailable(f"the kernels are written for Linux and macOS, not for {os.name}")
    compiler = _compiler()
    folder = _cache_folder()
    library = folder / f"kernels-{_key(compiler)}.so"
    if not library.exists():
        _build(compiler, library)
    return library


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    raise BackendUnavailable(f"no C++ compiler was found{f' at CXX={asked}' if asked else ''}; {REMEDY}")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "isthmus" / "cpu"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise BackendUnavailable(f"the cache folder {folder} cannot be used: {error}; set XDG_CACHE_HOME") from error
    if folder.stat().st_uid != os.getuid():
        raise BackendUnavailable(f"the cache folder {folder} belongs to another user; set XDG_CACHE_HOME")
    return folder


def _key(compiler: str) -> str:
    """Names what was built: from which sources, by which compiler, for which processor."""
    digest = hashlib.sha256()
    for path in _sources("*"):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    for part in (version.stdout, " ".join(FLAGS), processor_name(), " ".join(sorted(processor_flags()))):
        digest.update(part.encode())
    return digest.hexdigest()[:24]


def _sources(pattern: str) -> list[Path]:
    return sorted(path for path in SOURCES.glob(pattern) if path.suffix in (".cpp", ".h"))


def _build(compiler: str, library: Path) -> None:
    """Several processes may build at once: each in a folder of its own, and the last rename wins."""
    native = _native_flag(compiler)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:

        def compile_one(source: Path) -> str:
            made = str(Path(scratch) / f"{source.stem}.o")
            _run([compiler, *FLAGS, native, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(usable_cores()) as pool:
            objects = list(pool.map(compile_one, _sources("*.cpp")))
        made = Path(scratch) / "kernels.so"
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(made)])
        made.replace(library)


def _native_flag(compiler: str) -> str:
    failure = BackendUnavailable("unreachable")
    for flag in NATIVE:
        try:
            _run([compiler, flag, "-x", "c++", "-E", os.devnull, "-o", os.devnull])
        except BackendUnavailable as error:
            failure = error
        else:
            return flag
    raise failure


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        line = next((line for line in said if "error" in line), said[0] if said else "no message")
        raise BackendUnavailable(f"the kernels could not be compiled by {command[0]}: {line}; {REMEDY}") from error


def main() -> int:
    try:
        print(f"CPU kernels: {kernels_library()}")  # noqa: T201
    except BackendUnavailable as error:
        print(f"CPU kernels: {error}; plain torch will serve, more slowly", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
