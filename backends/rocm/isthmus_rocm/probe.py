"""Finding devices without an SDK and without torch: what the kernel driver (amdkfd) says in /sys."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus_rocm.architecture import KNOWN, architecture_of_version

DRIVER_NODE: Final = "dev/kfd"
TOPOLOGY: Final = "sys/class/kfd/kfd/topology/nodes"
DEVICE_HEAPS: Final = (1, 2)
"""Kinds of memory bank that are the device's own, visible to the host or not."""


@dataclass(frozen=True, slots=True)
class _Seen:
    arch: str
    name: str
    memory_bytes: int
    uuid: str
    render_node: Path


def probe_devices(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> list[DeviceInfo]:
    """Devices that this process may use, in the order in which HIP numbers them.

    One of an architecture that has no launch parameters is listed, and has to be asked for by name.
    Raises :class:`BackendUnavailable` where devices are there and what runs them is missing.
    """
    driver = root / DRIVER_NODE
    if not driver.exists():
        return []
    seen = [device for device in _devices(root) if device.render_node.exists()]
    for variable in ("ROCR_VISIBLE_DEVICES", _hip_variable(environment)):
        seen = _visible(seen, environment.get(variable))
    if seen:
        _require_access(driver, *(device.render_node for device in seen))
        _require_packages()
    return [
        DeviceInfo(
            backend="rocm",
            index=index,
            name=device.name,
            memory_bytes=device.memory_bytes,
            details=(("arch", device.arch), ("uuid", device.uuid)),
            auto=device.arch in KNOWN,
        )
        for index, device in enumerate(seen)
    ]


def _require_access(*nodes: Path) -> None:
    closed = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        raise BackendUnavailable(
            f"this user may not open {closed[0]}; "
            f"add it to the group that owns the file (usually render), or give the container access to it"
        )


def _require_packages() -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BackendUnavailable(
            "the rocm backend needs torch built for ROCm; install it from the package index of the PyTorch project"
        )
    if torch_hip_version(Path(spec.origin).with_name("version.py")) is None:
        raise BackendUnavailable(
            "there is an AMD device, but the torch that is installed is not built for ROCm; "
            "install that build from the package index of the PyTorch project"
        )
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("the rocm backend needs triton; install the one that torch's build for ROCm names")


def torch_hip_version(version_file: Path) -> str | None:
    """``torch.version.hip`` without importing torch, which takes a second and more."""
    try:
        text = version_file.read_text()
    except OSError:
        return None
    found = re.search(r"""^hip\b[^=\n]*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return found[1] if found else None


def _devices(root: Path) -> list[_Seen]:
    try:
        nodes = sorted((root / TOPOLOGY).iterdir(), key=lambda node: int(node.name))
    except (OSError, ValueError):
        return []
    devices = (_describe(node, root) for node in nodes)
    return [device for device in devices if device is not None]


def _describe(node: Path, root: Path) -> _Seen | None:
    """None for a node of processors, and for one that this container was not given."""
    properties = _properties(node / "properties")
    version = properties.get("gfx_target_version", 0)
    if properties.get("simd_count", 0) == 0 or version == 0:
        return None
    arch = architecture_of_version(version)
    render = f"renderD{properties.get('drm_render_minor', 0)}"
    banks = [_properties(bank / "properties") for bank in (node / "mem_banks").glob("*")]
    return _Seen(
        arch=arch,
        name=_product_name(root / f"sys/class/drm/{render}/device/product_name") or f"AMD {arch}",
        memory_bytes=sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in DEVICE_HEAPS),
        uuid=f"GPU-{properties.get('unique_id', 0):016x}",
        render_node=root / "dev/dri" / render,
    )


def _properties(file: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _product_name(file: Path) -> str:
    """Boards for servers have one."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _hip_variable(environment: Mapping[str, str]) -> str:
    return "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environment else "CUDA_VISIBLE_DEVICES"


def _visible(devices: list[_Seen], wanted: str | None) -> list[_Seen]:
    """What one variable leaves, in its order, up to the first entry unknown here."""
    if wanted is None:
        return devices
    chosen: list[_Seen] = []
    for entry in filter(None, (part.strip() for part in wanted.split(","))):
        if entry.isdigit():
            matching = devices[int(entry) : int(entry) + 1]
        else:
            matching = [device for device in devices if device.uuid.lower() == entry.lower()]
        if len(matching) != 1:
            break
        chosen += matching
    return chosen
