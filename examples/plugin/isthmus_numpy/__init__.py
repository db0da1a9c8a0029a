"""The plugin: what Isthmus imports when somebody asks for ``--device numpy``, and nothing heavier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.contract import Capabilities, DeviceInfo, GraphScope
from isthmus.errors import BackendError
from isthmus.hookspecs import hookimpl

if TYPE_CHECKING:
    from isthmus.contract import Backend

CONTRACT_VERSION = (1, 0)
DEVICE = DeviceInfo(backend="numpy", index=0, name="numpy on the host", auto=False)
CAPABILITIES = Capabilities(
    dtypes=("float32",),
    kv_dtypes=("float32",),
    block_sizes=(16, 8, 32),
    graph_scope=GraphScope.STEP,
    max_steps_in_flight=2,
    sliding_window=True,
    unified_memory=True,
    default_max_rows=16,
    default_max_tokens=512,
)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return [DEVICE]


@hookimpl
def isthmus_capabilities(device: DeviceInfo) -> Capabilities:
    return CAPABILITIES


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    if options:
        raise BackendError(f"backend 'numpy' takes no options; it was given {', '.join(sorted(options))}")
    from isthmus_numpy.backend import NumpyBackend

    return NumpyBackend()
