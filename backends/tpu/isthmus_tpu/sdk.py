"""Which of Google's two lines of software is installed, found without importing either.

- *torch_tpu*: a device ``tpu`` of its own and a Dynamo compiler of that name, for torch 2.11 and later.
- *torch_xla*: 2.9, the last of its line, for torch 2.9.0 alone.

torch_tpu 0.2 keeps its device functions to PyTorch itself (``torch.tpu.device_count`` raises and names
``torch.accelerator``), so that what is general is asked of ``torch.accelerator``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from isthmus.errors import BackendUnavailable

INSTALL: Final = (
    'install one of Google\'s two: torch_tpu (pip install "isthmus-engine[tpu]", torch 2.11 to 2.15), or torch_xla 2.9 '
    '(pip install "isthmus-engine[tpu-xla]", torch 2.9.0)'
)
TESTED: Final = "0.2.0"
"""The torch_tpu that was run; others may lack what :mod:`isthmus_tpu.in_place` needs of it."""
_EXPERIMENTAL: Final = r"<TorchTpu/ApiStage/ExperimentalApi/> (get_device_|_TpuDeviceProperties)"


class Route(StrEnum):
    TORCH_TPU = "torch_tpu"
    TORCH_XLA = "torch_xla"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sdk:
    route: Route
    version: str
    reason: str
    """Why this route, for a person."""
    rehearsal: bool = False
    """torch_xla computes on the host's processor (``PJRT_DEVICE=CPU``): the route without the hardware."""


def find(environment: Mapping[str, str] = os.environ) -> Sdk:
    """Raises :class:`BackendUnavailable` with what is missing."""
    has_xla = _has("torch_xla")
    if _has("torch_tpu"):
        beside = "; torch_xla is installed too and not used: torch_tpu succeeds it" if has_xla else ""
        version = version_of("torch_tpu")
        reason = f"torch_tpu {version} has a device of its own{beside}"
        return Sdk(route=Route.TORCH_TPU, version=version, reason=reason)
    if not has_xla:
        raise BackendUnavailable(f"the tpu backend needs software of Google's that is not installed; {INSTALL}")
    version = version_of("torch_xla")
    if environment.get("PJRT_DEVICE") == "CPU":
        reason = "PJRT_DEVICE=CPU: torch_xla computes on the host's processor, no TPU is used"
        return Sdk(route=Route.TORCH_XLA, version=version, reason=reason, rehearsal=True)
    reason = f"torch_xla {version} is installed and torch_tpu is not"
    return Sdk(route=Route.TORCH_XLA, version=version, reason=reason)


def load_torch_tpu() -> bool:
    """Import torch_tpu, and say whether it registered its device: it does where it finds a TPU.

    Raises :class:`BackendUnavailable` where it cannot be imported.
    """
    try:
        import torch

        importlib.import_module("torch_tpu")
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(
            f"torch_tpu cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); it has binaries "
            f"for torch 2.11 to 2.15: install both together, as the extra [tpu] does"
        ) from error
    # ``torch.tpu`` is there without a TPU as well; the name is given when the device is registered.
    return torch._C._get_privateuse1_backend_name() == "tpu"


def device_count() -> int:
    """Of the registered device."""
    import torch

    return torch.accelerator.device_count()


def device_name() -> str:
    with experimental():
        return str(_module().get_device_name())


def total_memory() -> int | None:
    """Bytes that the device has by its kind; None where the registered device is no TPU, but another PJRT client that
    was put in its place."""
    with experimental():
        try:
            return int(_module().get_device_properties().total_memory)
        except RuntimeError:
            return None


@contextmanager
def experimental() -> Iterator[None]:
    """Without the warnings by which torch_tpu says that a function used here may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_EXPERIMENTAL, category=UserWarning)
        yield


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _module() -> Any:
    import torch

    return torch.get_device_module("tpu")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
