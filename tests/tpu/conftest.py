"""TPU code without a TPU; skipped where the packages of requirements.txt are missing (`make test-tpu` has them)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PACKAGES = ("jax", "libtpu", "torch_tpu", "lammps_jax_pjrt_cpu")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

# A jax in this process must neither look for a TPU nor let torch load torch_tpu by itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        skip = pytest.mark.skip(reason=f"{', '.join(MISSING)} not installed; `make test-tpu` builds an environment")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_script() -> Run:
    """Runs a script of this folder in its own process and returns the JSON of its last line."""

    def run(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / script), *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run


@pytest.fixture(scope="session")
def cpu_as_tpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which torch_tpu finds XLA's CPU client where it looks for a TPU's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the PJRT shim")
    shim = tmp_path_factory.mktemp("pjrt") / "libshim.so"
    source = HERE / "pjrt_cpu_shim.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", shim, source, "-ldl"], check=True)
    package = importlib.util.find_spec("lammps_jax_pjrt_cpu")
    assert package is not None and package.origin is not None
    plugin = Path(package.origin).parent / "pjrt_c_api_cpu_plugin.so"
    return {"REAL_PJRT": str(plugin), "TPU_LIBRARY_PATH": str(shim)}


@pytest.fixture(scope="session")
def torch_tpu_step(
    run_script: Run, cpu_as_tpu: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The figures of torch_tpu_step.py, and in ``path`` the program it wrote."""
    path = str(tmp_path_factory.mktemp("stablehlo") / "step.mlir")
    return run_script("torch_tpu_step.py", "--stablehlo", path, **cpu_as_tpu) | {"path": path}
