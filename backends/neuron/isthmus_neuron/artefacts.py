"""Where compiled artefacts lie, so that a graph is compiled once and read from the disk at the next start.

Both lines of AWS's software keep a cache of their own, which knows an artefact by its graph and by the
compiler's flags; weights are a graph's inputs.  So the key is the model with its shapes, not its name: two
checkpoints of one architecture and size share what was compiled.  Here each version of the compiler gets a
folder, and the folder is the user's instead of /tmp.  What the user has set stands.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from isthmus_neuron.sdk import Route

NATIVE: Final = {
    "TORCH_NEURONX_NEFF_CACHE_DIR": "neff",
    "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": "neff-local",
    "TORCH_NEURONX_HLO_CACHE_DIR": "hlo",
}
"""Variables of torch-neuronx 2.13 and later, read when it is imported, and the folder that each gets."""
XLA: Final = "NEURON_COMPILE_CACHE_URL"
"""Of the "Neuron Persistent Cache"; ``--cache_dir`` among the flags of NEURON_CC_FLAGS goes before it."""
XLA_FLAGS: Final = "NEURON_CC_FLAGS"


def configure(route: Route, compiler: str, environment: MutableMapping[str, str]) -> None:
    """Make the settings, before AWS's software is imported."""
    if chosen_by_user(route, environment):
        return
    folder = _usable(folder_of(compiler, environment))
    if folder is None:
        return
    if route is Route.NATIVE:
        for variable, name in NATIVE.items():
            environment.setdefault(variable, str(folder / name))
    else:
        environment[XLA] = str(folder / "neuron-compile-cache")


def chosen_by_user(route: Route, environment: MutableMapping[str, str]) -> bool:
    if route is Route.NATIVE:
        return next(iter(NATIVE)) in environment
    return XLA in environment or "--cache_dir" in environment.get(XLA_FLAGS, "")


def folder_of(compiler: str, environment: MutableMapping[str, str]) -> Path:
    base = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "isthmus" / "neuron" / f"neuronx-cc-{compiler}"


def said(route: Route, environment: MutableMapping[str, str]) -> str:
    """Where they are, for :meth:`isthmus.contract.Backend.providers`."""
    flags = environment.get(XLA_FLAGS, "")
    if route is Route.XLA and "--cache_dir" in flags:
        return f"on disk, as {XLA_FLAGS} says: {flags}"
    variable = next(iter(NATIVE)) if route is Route.NATIVE else XLA
    if variable not in environment:
        return f"where AWS's software puts them: no folder could be made; set XDG_CACHE_HOME or {variable}"
    return f"on disk in {environment[variable]}, read again at the next start"


def _usable(folder: Path) -> Path | None:
    """The folder, made if need be; None where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
