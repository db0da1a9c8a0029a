"""What the CUDA backend decides without a device."""

from __future__ import annotations

import pytest

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendError, BackendUnavailable
from isthmus_cuda import probe
from isthmus_cuda.backend import open_backend
from isthmus_cuda.flash import find_flash
from isthmus_cuda.probe import _Seen, _visible

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
