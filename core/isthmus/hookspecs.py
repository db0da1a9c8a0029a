"""The hooks a backend plugin implements.  pluggy finds and opens backends; it is never in a step's path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pluggy

from isthmus.contract.capabilities import Capabilities, DeviceInfo

if TYPE_CHECKING:
    from isthmus.contract.execution import ExecutorBackend
    from isthmus.contract.parts import Backend

PROJECT_NAME: Final = "isthmus"
ENTRY_POINT_GROUP: Final = "isthmus.backends"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec(firstresult=True)
def isthmus_probe() -> list[DeviceInfo]:  # type: ignore[empty-body]
    """The devices this plugin sees, best first; an empty list where there are none.

    Called when ``--device`` names the plugin, for ``--device auto``, and by ``isthmus backends``;
    in any process, on any thread, possibly several times.  It must be cheap (under a second) and
    must not import an SDK unless a cheaper look says that the device is there.  Where the SDK is
    missing or broken it raises :class:`isthmus.errors.BackendUnavailable` with the remedy.

    Since contract 1.0.
    """


@hookspec(firstresult=True)
def isthmus_open(  # type: ignore[empty-body]
    device: DeviceInfo, options: dict[str, Any]
) -> Backend | ExecutorBackend:
    """Open ``device`` (one of those the probe returned) and return a :class:`Backend`, or an
    :class:`ExecutorBackend` where the plugin runs whole steps by itself.

    Called once in the process that will run the model, on its main thread, before any other use.
    ``options`` holds what the user gave for this backend (strings; unknown names must raise
    :class:`isthmus.errors.BackendError`); it must not be changed.

    Since contract 1.0.
    """


@hookspec(firstresult=True)
def isthmus_capabilities(device: DeviceInfo) -> Capabilities:  # type: ignore[empty-body]
    """What ``device`` can do, without opening it.  Optional: where it is missing, listing the
    backends opens the device and closes it again.

    Called in any process, on its main thread; equal to what the open backend says.

    Since contract 1.0.
    """
