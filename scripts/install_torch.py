"""Install torch into the running interpreter's environment, a CPU build where one is to be had.

A plain ``pip install torch`` on Linux brings a CUDA build of several GB.  This asks pip what it
would install; if that drags in a GPU vendor's libraries, uv is asked instead, which knows where
PyTorch keeps its CPU builds.  ``TORCH_PIP_ARGS`` (for example an ``--index-url``) overrides both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys

REQUIREMENT = os.environ.get("TORCH", "torch==2.13.0")
PIP = [sys.executable, "-m", "pip"]


def main() -> int:
    if importlib.util.find_spec("torch") is not None:
        return 0
    if extra := os.environ.get("TORCH_PIP_ARGS"):
        return subprocess.call([*PIP, "install", "-q", *shlex.split(extra), REQUIREMENT])
    if pip_would_bring_gpu_libraries() and install_with_uv():
        return 0
    return subprocess.call([*PIP, "install", "-q", REQUIREMENT])


def pip_would_bring_gpu_libraries() -> bool:
    command = [*PIP, "install", "-q", "--dry-run", "--ignore-installed", "--report", "-", REQUIREMENT]
    report = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if report.returncode != 0:
        return True
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return any(name.startswith("nvidia-") or name == "cuda-toolkit" for name in names)


def install_with_uv() -> bool:
    if subprocess.call([*PIP, "install", "-q", "uv"]) != 0:
        return False
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable]
    return subprocess.call([*command, "--torch-backend=cpu", REQUIREMENT]) == 0


if __name__ == "__main__":
    sys.exit(main())
