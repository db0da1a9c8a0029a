"""Where compiled programs lie, so that one is compiled once and read from the disk at the next start.

Both lines keep a cache of their own, which knows a program by its graph and the compiler's flags; weights
are a graph's inputs.  So the key is the model with its shapes, not its name: two checkpoints of one
architecture and size share what was compiled.  Here each pair of versions gets a folder.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from isthmus_tpu.sdk import Route, Sdk, version_of

ROOT: Final = "TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT"
"""Read by torch_tpu when it first compiles; vllm-torchtpu documents it (docs/user_guide/compilation_cache.md)."""


def configure(found: Sdk, environment: MutableMapping[str, str]) -> None:
    """Make the setting of torch_tpu, before it computes anything.  What the user has set stands."""
    if found.route is not Route.TORCH_TPU or ROOT in environment:
        return
    folder = usable(folder_of(found, environment))
    if folder is not None:
        environment[ROOT] = str(folder)
        # Set here, not by the user, who need not hear that it may change.
        warnings.filterwarnings("ignore", message=f"<TorchTpu/ApiStage/ExperimentalApi/> the {ROOT}")


def folder_of(found: Sdk, environment: Mapping[str, str]) -> Path:
    base = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "isthmus" / "tpu" / f"{found.route}-{found.version}-libtpu-{version_of('libtpu')}"


def usable(folder: Path) -> Path | None:
    """The folder, made if need be; None where it is not this user's to write: what lies there is run."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)  # fails for another user's
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
