"""Finding Gaudis: without Intel's bridge nothing is imported, with it the bridge counts them."""

from __future__ import annotations

import importlib.util

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus_gaudi import sdk


def probe_devices() -> list[DeviceInfo]:
    """The devices that the bridge counts, none of them opened: a name or a size would open one, and a process that
    has opened a Gaudi keeps all others from it.

    Raises :class:`BackendUnavailable` where the bridge is missing or counts none.
    """
    if importlib.util.find_spec("torch") is None or not sdk.is_installed():
        raise BackendUnavailable(
            f"the gaudi backend needs Intel's PyTorch bridge ({sdk.DISTRIBUTION}), which is not on PyPI; install "
            f"Intel Gaudi software with its PyTorch packages, or start from Intel's container image for PyTorch"
        )
    count = sdk.load().device_count()
    if count == 0:
        raise BackendUnavailable(
            "Intel's PyTorch bridge is installed and finds no Gaudi; see what hl-smi says, and give the container "
            "access to the devices (its habana runtime, HABANA_VISIBLE_DEVICES=all)"
        )
    return [DeviceInfo(backend="gaudi", index=index, name="Intel Gaudi") for index in range(count)]
