"""What the CUDA backend decides without a device."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from isthmus.contract import AttentionSpec, DeviceInfo
from isthmus.errors import BackendError, BackendUnavailable, Unsupported
from isthmus.executor.sizing import choose_kv_dtype
from isthmus_cuda import context, probe
from isthmus_cuda.backend import capabilities_of, open_backend
from isthmus_cuda.flash import FlashAttention, _FlashPlanning, find_flash
from isthmus_cuda.probe import _Seen, _visible
from isthmus_triton.attention import BlockCache, TritonAttention
from isthmus_triton.launch import FALLBACK

DEVICES = [_Seen("first", 80, "GPU-aaaa"), _Seen("second", 80, "GPU-bbbb")]
INFO = DeviceInfo(backend="cuda", index=0, name="a card")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (None, ["first", "second"]),
        ("", []),
        ("1", ["second"]),
        ("1,0", ["second", "first"]),
        ("0,7,1", ["first"]),
        ("GPU-bb", ["second"]),
        ("GPU-cc", []),
        ("-1", []),
    ],
)
def test_visible_devices_are_those_cuda_sees(wanted: str | None, names: list[str]) -> None:
    assert [device.name for device in _visible(DEVICES, wanted)] == names


def test_no_device_node_means_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DEVICE_NODES", ("/nonexistent",))
    assert probe.probe_devices() == []


def test_a_device_without_its_driver_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DEVICE_NODES", ("/dev/null",))
    monkeypatch.setattr(probe, "LIBRARY", "libnothing.so.0")
    with pytest.raises(BackendUnavailable, match="install the driver"):
        probe.probe_devices()


@pytest.mark.parametrize(("options", "named"), [({"speed": "high"}, "speed"), ({"flash": "on"}, "auto or off")])
def test_options_that_are_not_known_are_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(BackendError, match=named):
        open_backend(INFO, options)


def test_why_there_is_no_flash_attention() -> None:
    assert find_flash("sm_90", "off").function is None
    assert "sm_80" in find_flash("sm_80", "auto").reason
    provider = find_flash("sm_90", "auto")
    assert provider.function is not None or "FlashAttention-3" in provider.reason


def test_a_cache_of_8_bits_needs_a_device_that_converts_them() -> None:
    assert "float8_e4m3fn" not in capabilities_of((8, 0)).kv_dtypes
    assert all("float8_e4m3fn" in capabilities_of(capability).kv_dtypes for capability in ((8, 9), (9, 0), (12, 0)))
    assert choose_kv_dtype("fp8", "bfloat16", capabilities_of((9, 0)), "cuda") == "float8_e4m3fn"
    with pytest.raises(Unsupported, match="not in 'float8_e4m3fn'"):
        choose_kv_dtype("fp8", "bfloat16", capabilities_of((8, 0)), "cuda")


@pytest.mark.parametrize(("kept", "flash"), [(torch.bfloat16, True), (torch.float8_e4m3fn, False)])
def test_flash_attention_takes_a_cache_in_the_queries_dtype_alone(
    monkeypatch: pytest.MonkeyPatch, kept: torch.dtype, flash: bool
) -> None:
    called = []
    monkeypatch.setattr(TritonAttention, "attend_long", lambda *arguments: called.append("triton"))
    attention = FlashAttention(
        torch.device("cpu"), FALLBACK, 3, lambda *arguments, **more: called.append("flash"), eight_bit_cache=True
    )
    layer = AttentionSpec(heads=2, kv_heads=1, head_dim=64, scale=0.125)
    query = torch.zeros(9, 2, 64, dtype=torch.bfloat16)
    cache = BlockCache(*(torch.zeros(3, 1, 16, 64, dtype=kept) for _ in range(2)))
    one = torch.zeros(1, dtype=torch.int32)
    plan = _FlashPlanning({}, {}, {}, False, one[None])
    inputs = Mock(max_query_length=9, no_singles=True)
    attention.attend_long(query, cache, torch.zeros(9, 128, dtype=torch.bfloat16), layer, plan, inputs)
    assert called == ["flash" if flash else "triton"]


class FakeDriver:
    """The CUDA driver's library, some of whose calls fail."""

    def __init__(self, **status: int) -> None:
        self.status = status
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            return self.status.get(name, 0)

        return call


@pytest.mark.parametrize(
    ("driver", "called"),
    [
        (FakeDriver(), ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]),
        (FakeDriver(cuInit=100), ["cuInit"]),
        (FakeDriver(cuDeviceGet=101), ["cuInit", "cuDeviceGet"]),
    ],
    ids=["there", "no device", "no such device"],
)
def test_the_context_is_made_on_a_thread(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, called: list[str]
) -> None:
    monkeypatch.setattr(context.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    thread = context.begin_context(0)
    thread.join(5)
    assert not thread.is_alive() and driver.called == called
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_a_context_without_a_driver_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "DRIVER", "libnothing.so.0")
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    context.begin_context(0).join(5)
