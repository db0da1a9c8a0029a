"""Makes a virtual environment with torch_xla, for a machine that has only a CPU.

torch_xla 2.9.0 links to torch 2.9.0 exactly, and the torch of that version on PyPI is built for CUDA: with its
libraries it takes some 7 GB.  Here torch comes without them.  What is left would not import, since its libraries name
CUDA's; so empty libraries of those names are made and put beside torch's own, where the loader looks last: the real
ones, if they are ever installed, win.  Only ``import torch`` and the CPU may be used in such an environment.

    python scripts/xla_env.py [.venv-xla]
    PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest tests/xla
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.9.0"
PYTHONS = ((3, 11), (3, 13))
"""First and last that both isthmus and the wheels of torch_xla 2.9.0 are for."""

LIGHT = (
    *("filelock", "typing-extensions>=4.10", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"),  # torch
    *("absl-py>=1.0", "numpy", "pyyaml", "requests", "setuptools"),  # torch_xla
)
"""What torch and torch_xla need beside CUDA and Triton."""

TESTS = ("pytest", "pytest-timeout", "pytest-asyncio", "hypothesis")

CUDA_LIBRARY = re.compile(r"lib(cu|nv|nccl)")
CUDA_SYMBOL = re.compile(r"(cu|nccl|nv)(?!tlass)\w+")
TEXT_SYMBOL = re.compile(r"Get\w*(String|Name)$")
"""These return text, which a caller reads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=ROOT / ".venv-xla", help="the environment to make")
    path: Path = parser.parse_args().path
    check_machine()
    began = time.perf_counter()

    python = path / "bin" / "python"
    if not python.exists():
        say(f"Making {path} for Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", str(path)])
    say("Installing what isthmus, torch and its tests need")
    # Before torch, so that pip does not complain of what torch does without.
    pip(python, [*isthmus_requirements(), *LIGHT, *test_requirements()])
    say(f"Installing torch and torch_xla {TORCH} without CUDA (900 MB to download)")
    pip(python, ["--no-deps", f"torch=={TORCH}", f"torch_xla=={TORCH}"])
    pip(python, ["--no-deps", "--editable", str(ROOT)])

    made = make_stand_ins(torch_libraries(python))
    say(f"Made {made} empty libraries in the place of CUDA's" if made else "CUDA's libraries, or stand-ins, are there")
    say(check(python))
    say(f"Ready in {time.perf_counter() - began:.0f} s: PJRT_DEVICE=CPU {python} -m pytest tests/xla")


def check_machine() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        stop(f"torch_xla {TORCH} exists for Linux on x86_64, and this is {platform.system()} on {platform.machine()}")
    first, last = PYTHONS
    if not first <= sys.version_info[:2] <= last:
        stop(f"torch_xla {TORCH} is for Python {first[0]}.{first[1]} to {last[0]}.{last[1]}, and this is Python "
             f"{platform.python_version()}; run this script with another")  # fmt: skip
    for tool, package in (("gcc", "gcc"), ("readelf", "binutils")):
        if shutil.which(tool) is None:
            stop(f"{tool} is missing, which makes the stand-ins for CUDA's libraries; install {package}")


def isthmus_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def test_requirements() -> list[str]:
    """In the versions that the project's own tests ask for."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    return [line for line in group if re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0] in TESTS]


def torch_libraries(python: Path) -> Path:
    """Not by importing torch, which may not be possible yet."""
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    folder = Path(site) / "torch" / "lib"
    if not folder.is_dir():
        stop(f"torch was installed but {folder} is not there; delete the environment and run this again")
    return folder


@dataclass
class Needed:
    """What a set of shared libraries asks of libraries that are not there."""

    libraries: set[str] = field(default_factory=set)
    versions: dict[str, set[str]] = field(default_factory=dict)  # by library, the names of its symbol versions
    symbols: dict[str, set[str]] = field(default_factory=dict)  # by version
    unversioned: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)

    def read(self, library: Path) -> None:
        names = re.findall(r"NEEDED.*\[(.+?)\]", run(["readelf", "-Wd", str(library)]))
        self.libraries |= {name for name in names if CUDA_LIBRARY.match(name)}
        self._read_versions(run(["readelf", "-WV", str(library)]))
        for line in run(["readelf", "-W", "--dyn-syms", str(library)]).splitlines():
            self._read_symbol(line.split())

    def _read_versions(self, text: str) -> None:
        owner = ""
        for line in text.splitlines():
            if file := re.search(r"File: (\S+)", line):
                owner = file[1]
            if owner and (version := re.search(r"Name: (\S+)\s+Flags", line)):
                self.versions.setdefault(owner, set()).add(version[1])

    def _read_symbol(self, fields: Sequence[str]) -> None:
        if len(fields) < 8:
            return
        name, _, version = fields[7].replace("@@", "@").partition("@")
        if fields[6] != "UND":
            self.defined.add(name)
        elif version:
            self.symbols.setdefault(version, set()).add(name)
        elif CUDA_SYMBOL.fullmatch(name):
            self.unversioned.add(name)


def make_stand_ins(folder: Path) -> int:
    """Write a library for each of CUDA's that those in ``folder`` need and that is not there; how many.

    Every function fails: it returns 100, which is cudaErrorNoDevice, or text that says what it is.
    """
    needed = Needed()
    for library in sorted(folder.glob("*.so*")):
        needed.read(library)
    installed = folder.parent.parent / "nvidia"
    missing = sorted(
        name for name in needed.libraries if not (folder / name).exists() and not any(installed.rglob(name))
    )
    loose = needed.unversioned - needed.defined
    for name in missing:
        versions = {version: needed.symbols.get(version, set()) for version in needed.versions.get(name, set())}
        # A symbol without a version may come from any library; the first has them.
        write_library(folder / name, versions, loose if name == missing[0] else ())
    return len(missing)


def write_library(path: Path, versions: dict[str, set[str]], loose: Iterable[str]) -> None:
    names = sorted(set(loose).union(*versions.values()))
    source = "\n".join(
        f'const char *{name}(void) {{ return "no CUDA here: an empty library stands in"; }}'
        if TEXT_SYMBOL.search(name)
        else f"int {name}(void) {{ return 100; }}"
        for name in names
    )
    blocks = (
        f"{version} {{ {'global: ' + ' '.join(f'{name};' for name in sorted(symbols)) if symbols else ''} }};"
        for version, symbols in sorted(versions.items())
    )
    code, script = path.with_suffix(".c"), path.with_suffix(".map")
    code.write_text(source or "int stand_in(void) { return 0; }")
    script.write_text("\n".join(blocks))
    command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(path), str(code), f"-Wl,-soname,{path.name}"]
    run([*command, f"-Wl,--version-script={script}"] if versions else command)
    code.unlink()
    script.unlink()


def check(python: Path) -> str:
    """Compute something on torch_xla's CPU device; what it is."""
    code = (
        "import os; os.environ['PJRT_DEVICE'] = 'CPU'\n"
        "import torch, torch_xla, isthmus\n"
        "assert (torch.ones(2, device=torch_xla.device()) + 1).cpu().tolist() == [2.0, 2.0]\n"
        "print(f'torch {torch.__version__}, torch_xla {torch_xla.__version__}, computes on {torch_xla.device()}')"
    )
    return run([str(python), "-c", code]).strip()


def pip(python: Path, arguments: Sequence[str]) -> None:
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        stop(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def say(line: str) -> None:
    print(line, flush=True)


def stop(reason: str) -> None:
    raise SystemExit(f"xla_env.py: {reason}")


if __name__ == "__main__":
    main()
