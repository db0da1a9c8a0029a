"""Intel's PyTorch bridge: whether it is there, its settings, and the one place where it is imported.

The settings are environment variables that the bridge documents ("Runtime Environment Variables" of its
documentation) and reads at the latest when a process opens the device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Final

from isthmus.errors import BackendUnavailable

MODULE: Final = "habana_frameworks.torch"
DISTRIBUTION: Final = "habana-torch-plugin"

LAZY_MODE: Final = "PT_HPU_LAZY_MODE"
RECIPE_CACHE: Final = "PT_HPU_RECIPE_CACHE_CONFIG"
"""Three fields: a folder, whether to empty it first, and its largest size in MB."""
RECIPE_CACHE_MB: Final = 16384


def is_installed() -> bool:
    """Whether there is a bridge to import.  Imports at most the empty package that it lies in."""
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:
        return False


def load() -> ModuleType:
    """``habana_frameworks.torch.hpu``, with the settings made before the bridge is first imported.

    Raises :class:`BackendUnavailable` where it cannot be imported, or is set to its lazy mode.
    """
    configure(os.environ)
    try:
        importlib.import_module(MODULE)
        return importlib.import_module(f"{MODULE}.hpu")
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(
            f"Intel's PyTorch bridge cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); "
            f"it needs the very torch that it was built for: install both from one release of Intel Gaudi software"
        ) from error


def configure(environment: MutableMapping[str, str]) -> None:
    """Eager mode with torch.compile, which releases before 1.21 do not default to, and a recipe cache on disk.

    What the user has set stands.
    """
    if environment.setdefault(LAZY_MODE, "0") != "0":
        raise BackendUnavailable(
            f"{LAZY_MODE} is {environment[LAZY_MODE]}, and the gaudi backend compiles its steps, which the bridge's "
            f"lazy mode does not; unset the variable, or set it to 0"
        )
    if RECIPE_CACHE not in environment:
        folder = _usable(recipe_folder(environment))
        if folder is not None:
            environment[RECIPE_CACHE] = f"{folder},false,{RECIPE_CACHE_MB}"


def recipe_folder(environment: MutableMapping[str, str]) -> Path:
    """Where compiled recipes lie, apart for each release of the bridge and of torch.

    The bridge knows a recipe by its graph, shapes and dtypes, and weights are its inputs: models share the folder.
    """
    base = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "isthmus" / "gaudi" / f"recipes-{version(DISTRIBUTION)}-torch-{version('torch')}"


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def recipe_cache_said(environment: MutableMapping[str, str]) -> str:
    """What serves as a cache of compiled recipes, for :meth:`isthmus.contract.Backend.providers`."""
    folder = environment.get(RECIPE_CACHE, "").partition(",")[0]
    if not folder:
        return f"none: {recipe_folder(environment)} cannot be used; set XDG_CACHE_HOME or {RECIPE_CACHE}"
    return f"on disk in {folder}, read again at the next start"


def _usable(folder: Path) -> Path | None:
    """The folder, made if need be; None where it is not this user's alone, or cannot be named in a setting's field."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)  # fails for another user's, whose recipes would be run
    except OSError:
        return None
    return None if "," in str(folder) else folder
