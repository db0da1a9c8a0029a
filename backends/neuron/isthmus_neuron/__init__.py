"""AWS Inferentia and Trainium: the name is taken, the backend is not written yet.

Choosing it says so in one line; nothing here pretends to run.
"""

from __future__ import annotations

from typing import Any

from isthmus.contract import Backend, DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus.hookspecs import hookimpl

CONTRACT_VERSION = (1, 0)

REASON = (
    "this release has no backend for AWS Inferentia and Trainium yet; "
    "use --device cpu, or install a plugin that provides one"
)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    raise BackendUnavailable(REASON)


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    raise BackendUnavailable(REASON)
