"""Finding an AMD device and choosing what serves it, over made-up machines: no card, no build of torch for one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import isthmus_rocm.backend
import isthmus_rocm.probe
from isthmus.contract import Backend, DeviceInfo
from isthmus.errors import BackendError, BackendUnavailable
from isthmus_rocm.aiter import AiterAttention
from isthmus_rocm.architecture import KNOWN, architecture, architecture_of_version
from isthmus_rocm.backend import has_wide_products, open_backend
from isthmus_rocm.probe import probe_devices, torch_hip_version
from isthmus_rocm.targets import TARGETS
from isthmus_triton.attention import TritonAttention
from isthmus_triton.launch import LaunchTable

DEVICE = DeviceInfo(backend="rocm", index=0, name="AMD gfx942")
MI300X = {"simd_count": 1216, "gfx_target_version": 90402, "drm_render_minor": 128, "unique_id": 0xABC}
MI210 = {"simd_count": 416, "gfx_target_version": 90010, "drm_render_minor": 129, "unique_id": 0xDEF}
ONBOARD = {"simd_count": 4, "gfx_target_version": 100306, "drm_render_minor": 130, "unique_id": 0}
PROCESSOR = {"cpu_cores_count": 32, "simd_count": 0, "gfx_target_version": 0}


class Machine:
    """A root folder with what the driver would show."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes = root / isthmus_rocm.probe.TOPOLOGY
        (root / "dev/dri").mkdir(parents=True)
        self.nodes.mkdir(parents=True)
        (root / "dev/kfd").touch()

    def add(self, properties: dict[str, int], *, product: str = "", banks: tuple[tuple[int, int], ...] = ()) -> None:
        node = self.nodes / str(len(list(self.nodes.iterdir())))
        node.mkdir()
        write(node / "properties", properties)
        for index, (heap, size) in enumerate(banks):
            write(node / f"mem_banks/{index}/properties", {"heap_type": heap, "size_in_bytes": size})
        if "drm_render_minor" in properties:
            render = f"renderD{properties['drm_render_minor']}"
            (self.root / "dev/dri" / render).touch()
            if product:
                file = self.root / f"sys/class/drm/{render}/device/product_name"
                file.parent.mkdir(parents=True)
                file.write_text(product + "\n")


def write(file: Path, properties: dict[str, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name} {value}\n" for name, value in properties.items()))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(isthmus_rocm.probe, "torch_hip_version", lambda file: "6.4")
    return Machine(tmp_path)


def test_no_driver_no_device(tmp_path: Path) -> None:
    assert probe_devices(tmp_path, {}) == []


def test_devices_of_a_machine(machine: Machine) -> None:
    machine.add(PROCESSOR, banks=((0, 1 << 40),))
    machine.add(MI300X, product="AMD Instinct MI300X", banks=((1, 192 << 30), (0, 1 << 30)))
    machine.add(MI210, banks=((2, 64 << 30),))
    machine.add(ONBOARD)
    first, second, onboard = probe_devices(machine.root, {})
    assert (first.index, first.name, first.memory_bytes) == (0, "AMD Instinct MI300X", 192 << 30)
    assert dict(first.details) == {"arch": "gfx942", "uuid": "GPU-0000000000000abc"}
    assert (second.index, second.name, second.memory_bytes) == (1, "AMD gfx90a", 64 << 30)
    assert first.auto and second.auto
    assert dict(onboard.details)["arch"] == "gfx1036" and not onboard.auto


@pytest.mark.parametrize(
    ("environment", "archs"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["gfx90a"]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, ["gfx90a", "gfx942"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["gfx942"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000DEF"}, ["gfx90a"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["gfx90a"]),
        ({"HIP_VISIBLE_DEVICES": "0,7,1"}, ["gfx942"]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_variables_choose_devices(machine: Machine, environment: dict[str, str], archs: list[str]) -> None:
    machine.add(PROCESSOR)
    machine.add(MI300X)
    machine.add(MI210)
    devices = probe_devices(machine.root, environment)
    assert [dict(device.details)["arch"] for device in devices] == archs
    assert [device.index for device in devices] == list(range(len(archs)))


def test_a_device_that_the_container_was_not_given_is_not_there(machine: Machine) -> None:
    machine.add(MI300X)
    (machine.root / "dev/dri/renderD128").unlink()
    assert probe_devices(machine.root, {}) == []


def test_torch_that_is_not_built_for_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add(MI300X)
    monkeypatch.setattr(isthmus_rocm.probe, "torch_hip_version", lambda file: None)
    with pytest.raises(BackendUnavailable, match="not built for ROCm; install that build"):
        probe_devices(machine.root, {})


def test_no_right_to_open_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add(MI300X)
    monkeypatch.setattr(os, "access", lambda file, mode: "render" not in str(file))
    with pytest.raises(BackendUnavailable, match=r"may not open .*renderD128; add it to the group"):
        probe_devices(machine.root, {})


def test_which_torch_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "version.py"
    assert torch_hip_version(file) is None
    file.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482-0f2d60242'\nrocm = '6.4'\n")
    assert torch_hip_version(file) == "6.4.43482-0f2d60242"
    file.write_text("__all__ = ['hip']\nhip: Optional[str] = None\nrocm: Optional[str] = '6'\n")
    assert torch_hip_version(file) is None
    assert torch_hip_version(Path(torch.__file__).with_name("version.py")) == torch.version.hip


@pytest.mark.parametrize(
    ("version", "arch"),
    [(90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (110000, "gfx1100"), (120001, "gfx1201")],
)
def test_names(version: int, arch: str) -> None:
    assert architecture_of_version(version) == arch
    assert architecture(f"{arch}:sramecc+:xnack-") == architecture(arch) == arch


@pytest.fixture
def built_for_rocm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Torch as its ROCm build answers, over tensors that hold nothing."""
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "6.4.43482", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(isthmus_rocm.backend, "hip_device", lambda index: torch.device("meta"))
    monkeypatch.setattr(isthmus_rocm.backend, "has_wide_products", lambda device: True)
    return properties


@pytest.mark.parametrize("arch", KNOWN)
def test_opens_each_architecture(built_for_rocm: SimpleNamespace, arch: str) -> None:
    built_for_rocm.gcnArchName = f"{arch}:sramecc+:xnack-"
    backend = open_backend(DEVICE, {})
    assert isinstance(backend, Backend)
    assert backend.name == "rocm" and backend.arch == arch
    assert backend.capabilities.max_head_dim == TARGETS[arch].max_head_dim
    assert ("float8_e4m3fn" in backend.capabilities.kv_dtypes) == (arch == "gfx1201")
    assert f"launch parameters for {arch}" in backend.providers()["attention"]
    assert "float32 from its accumulators" in backend.providers()["linear"]


def test_logits_of_an_older_torch(built_for_rocm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isthmus_rocm.backend, "has_wide_products", lambda device: False)
    assert "rounded to the weights' dtype" in open_backend(DEVICE, {}).providers()["linear"]


def test_refuses_what_it_has_no_parameters_for(built_for_rocm: SimpleNamespace) -> None:
    built_for_rocm.gcnArchName = "gfx1036"
    with pytest.raises(BackendUnavailable, match=r"is gfx1036, for which .* they have some for gfx90a, gfx942"):
        open_backend(DEVICE, {})


def test_refuses_another_torch_and_options(built_for_rocm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="has no option speed; it takes aiter=off or aiter=on"):
        open_backend(DEVICE, {"speed": "high"})
    with pytest.raises(BackendError, match="option aiter is 'auto'; it must be off or on"):
        open_backend(DEVICE, {"aiter": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="cannot use AMD gfx942; see what rocminfo says"):
        open_backend(DEVICE, {})
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(BackendUnavailable, match="not built for ROCm"):
        open_backend(DEVICE, {})


def test_aiter_is_taken_only_where_it_is_asked_for(
    built_for_rocm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def find(arch: str) -> Callable[..., None]:
        asked.append(arch)
        return lambda **given: None

    monkeypatch.setattr(isthmus_rocm.backend, "find_aiter", find)
    for options in ({}, {"aiter": "off"}):
        backend = open_backend(DEVICE, options)
        assert type(backend.attention) is TritonAttention
        assert "AITER's are off, for nothing was measured" in backend.providers()["attention of long spans"]
    assert not asked
    backend = open_backend(DEVICE, {"aiter": "on"})
    assert asked == ["gfx942"] and isinstance(backend.attention, AiterAttention)
    assert "AITER's unified attention, by request" in backend.providers()["attention of long spans"]


def test_aiter_that_cannot_be_had_is_said(built_for_rocm: SimpleNamespace) -> None:
    built_for_rocm.gcnArchName = "gfx1100"
    with pytest.raises(BackendUnavailable, match="AITER was asked for and cannot be used: its attention is for gfx942"):
        open_backend(DEVICE, {"aiter": "on"})


def test_wide_products_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    def right(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return a.to(out_dtype) @ b.to(out_dtype)

    def rounded(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return (a @ b).to(out_dtype)

    def refused(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("gemm input type at::BFloat16 and output type float is not supported for ROCm")

    for product, expected in ((right, True), (rounded, False), (refused, False)):
        monkeypatch.setattr(torch, "mm", product)
        assert has_wide_products(cpu) is expected


def test_tables_are_within_what_a_program_may_have() -> None:
    assert tuple(TARGETS) == KNOWN
    for name, target in TARGETS.items():
        table: LaunchTable = target.launch
        launches = [launch for _, launch in (*table.decode, *table.prefill)]
        warps = [table.choose_warps, *(launch.warps for launch in launches)]
        assert max(warps) * target.wavefront <= 1024, name
        assert table.decode[-1][0] == table.prefill[-1][0] == 2 * target.max_head_dim
        # What only one family's compiler and instructions know.
        assert all(launch.await_stores == (target.wavefront == 64) for _, launch in table.decode)
        assert all(("matrix_instr_nonkdim" in dict(launch.compiler)) == (target.wavefront == 64) for launch in launches)
        assert not table.overlap
