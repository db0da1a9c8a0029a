"""The wheel in an environment of its own: nothing of this tree is on its path.

Third-party packages come from the environment that runs the tests, linked one by one, so that nothing is fetched
but the build tool; of Isthmus there is what the wheels hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plugin"


@dataclass(frozen=True)
class Clean:
    """An environment with Isthmus and the example installed from their wheels."""

    bin: Path
    folder: Path

    def run(self, *command: str, timeout_s: float = 110) -> str:
        """Output of a command of its ``bin``, in an empty folder; fails with all that it said."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        ran = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=kept | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
        return ran.stdout


def build(project: Path, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(project)], check=True, timeout=110)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    folder = tmp_path_factory.mktemp("clean")
    wheels = [build(project, folder / name) for name, project in (("core", ROOT), ("example", EXAMPLE))]
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = venv / "lib" / version / "site-packages"
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "isthmus" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "--python", str(venv), "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", *map(str, wheels)], check=True, timeout=60)
    empty = folder / "empty"
    empty.mkdir()
    return Clean(venv / "bin", empty)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
"""It fetches the build tool, and certifies twice."""


def test_it_is_the_wheel_that_is_imported(clean: Clean) -> None:
    names = ("isthmus", "isthmus_server", "isthmus_cpu", "isthmus_rocm", "isthmus_triton", "isthmus_numpy")
    code = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)})"
    files = clean.run("python", "-c", code).split()
    assert len(files) == len(names) and all(file.startswith(str(clean.bin.parent)) for file in files), files


def test_every_backend_is_listed(clean: Clean) -> None:
    listed = clean.run("isthmus", "backends")
    for name in ("cpu", "cuda", "rocm", "gaudi", "tpu", "neuron", "null", "numpy"):
        assert name in listed


def test_the_kernels_sources_are_there(clean: Clean) -> None:
    """The CPU backend compiles them where it runs."""
    found = clean.run("python", "-c", "from importlib.resources import files; print(*files('isthmus_cpu').rglob('*'))")
    assert ".cpp" in found


@pytest.mark.parametrize("device", ["null", "numpy"])
def test_it_certifies(clean: Clean, device: str) -> None:
    report = json.loads(clean.run("isthmus", "certify", "--device", device, "--json", timeout_s=300))
    assert report["certified"], report
    assert not list(clean.folder.iterdir()), "the kit leaves files where it runs"
