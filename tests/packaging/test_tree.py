"""What the distribution ships, and what the tree may and may not say."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VENDOR_WORDS = re.compile(
    r"\b(cuda|nvidia|amd|rocm|hip|gaudi|habana|hpu|tpu|neuron|trainium|inferentia|intel|xla|h100|h200)\b", re.IGNORECASE
)


def test_the_wheel_ships_every_package_of_the_tree() -> None:
    listed = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    roots = [ROOT / "core", ROOT / "server", *(ROOT / "backends").iterdir()]
    found = {
        str(package.parent.relative_to(ROOT))
        for root in roots
        if root.is_dir()
        for package in root.glob("isthmus*/__init__.py")
    }
    assert listed == found


def test_every_package_has_an_init_file() -> None:
    for source in ("core", "server", "backends"):
        for path in (ROOT / source).rglob("isthmus*/**/*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} is not a package"


def test_each_device_name_has_an_entry_point() -> None:
    names = {entry.name for entry in entry_points(group="isthmus.backends")}
    assert {"cpu", "cuda", "rocm", "gaudi", "tpu", "neuron"} <= names


def test_each_accelerator_has_an_extra() -> None:
    assert {"cpu", "cuda", "rocm", "gaudi", "tpu", "neuron"} <= set(PYPROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("folder", ["core", "server"])
def test_core_and_server_name_no_vendor(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if VENDOR_WORDS.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module",
    ["isthmus", "isthmus.contract", "isthmus.plugins", "isthmus.scheduler", "isthmus.cache", "isthmus.engine.client",
     "isthmus_server", "isthmus_server.app", "isthmus_server.cli", "isthmus_cpu", "isthmus_cuda", "isthmus_rocm",
     "isthmus_gaudi", "isthmus_tpu", "isthmus_neuron", "isthmus_static"],
)  # fmt: skip
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_nothing_names_this_machine_or_an_index() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    forbidden = re.compile(r"/work/(main|shared)|\.library/|/opt/wheels|find-links|--extra-index-url")
    found = []
    for name in tracked.stdout.decode().split("\0"):
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file() or path.suffix in {".png", ".lock"}:
            continue
        found += [f"{name}: {match.group()}" for match in forbidden.finditer(path.read_text(errors="ignore"))]
    assert not found, "\n".join(found)
