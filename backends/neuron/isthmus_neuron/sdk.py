"""Which of AWS's two lines of software is installed, found without importing either.

- *native*: torch-neuronx from 2.13 on ("TorchNeuron"), a device ``neuron`` of its own and a Dynamo
  compiler of that name; for Trainium2 and Trainium3.
- *xla*: torch-neuronx 2.9 over torch_xla 2.9; for Inferentia2 and Trainium1, which the other line
  does not drive.

Neither is on PyPI.  What has their names there is one module that raises as soon as it is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Final

from isthmus.errors import BackendUnavailable

FIRST_NATIVE: Final = (2, 13)
XLA_LINE: Final = "2.9"
INSTALL: Final = (
    "AWS's software is not on PyPI: install torch-neuronx and neuronx-cc from the Neuron package repository that AWS's "
    "documentation names (for Trainium2 and 3 torch-neuronx 2.13 or later, for Inferentia2 and Trainium1 the 2.9 line)"
)
_PLACEHOLDER: Final = "WRONG PACKAGE"


class Route(StrEnum):
    NATIVE = "native"
    XLA = "xla"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sdk:
    route: Route
    version: str
    """Of torch-neuronx, or of torch_xla where that is all there is."""
    reason: str
    """Why this route, for a person."""
    rehearsal: bool = False
    """torch_xla computes on the host's processor (``PJRT_DEVICE=CPU``): the route without the hardware."""


def find(environment: Mapping[str, str] = os.environ) -> Sdk:
    """Raises :class:`BackendUnavailable` with what is missing."""
    rehearsal = environment.get("PJRT_DEVICE") == "CPU"
    has_xla = _has("torch_xla")
    module = importlib.util.find_spec("torch_neuronx")
    if module is None:
        if has_xla and rehearsal:
            reason = "PJRT_DEVICE=CPU: torch_xla computes on the host's processor, no AWS device is used"
            return Sdk(route=Route.XLA, version=_version("torch-xla"), reason=reason, rehearsal=True)
        raise BackendUnavailable(f"the neuron backend needs torch-neuronx; {INSTALL}")
    source = _source(module.origin)
    if _PLACEHOLDER in source:
        raise BackendUnavailable(
            f"the torch-neuronx that is installed is the placeholder of that name on PyPI, which has nothing in it; "
            f"uninstall it (and neuronx-cc and libneuronxla, if those came from there too); {INSTALL}"
        )
    version = _version("torch-neuronx", source)
    if _release(version) >= FIRST_NATIVE:
        beside = "; torch_xla is installed too and not used: the newer line wins" if has_xla else ""
        reason = f"torch-neuronx {version} has a device of its own{beside}"
        return Sdk(route=Route.NATIVE, version=version, reason=reason)
    if not has_xla:
        raise BackendUnavailable(f"torch-neuronx {version} runs over torch_xla {XLA_LINE}, which is missing; {INSTALL}")
    reason = f"torch-neuronx {version} is of the line that runs over torch_xla; the device `neuron` came with 2.13"
    return Sdk(route=Route.XLA, version=version, reason=reason, rehearsal=rehearsal)


def load_native() -> ModuleType:
    """``torch.neuron``.  The settings of :mod:`isthmus_neuron.artefacts` are made before.

    Raises :class:`BackendUnavailable` where torch-neuronx cannot be imported.
    """
    try:
        importlib.import_module("torch_neuronx")
        import torch

        neuron: ModuleType = torch.get_device_module("neuron")
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(
            f"torch-neuronx cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); it needs the "
            f"torch that it was built for: take both from one release of AWS's Neuron software"
        ) from error
    return neuron


def compiler_version() -> str:
    """Of neuronx-cc, which both lines call."""
    return _version("neuronx-cc")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _source(origin: str | None) -> str:
    try:
        return Path(origin or "").read_text(errors="replace")
    except OSError:
        return ""


def _version(distribution: str, source: str = "") -> str:
    """As installed, or as the module's text says; "unknown" where neither does."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", source, re.MULTILINE)
        return found[1] if found else "unknown"


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers; of a version that is none, those of the newer line."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else FIRST_NATIVE
