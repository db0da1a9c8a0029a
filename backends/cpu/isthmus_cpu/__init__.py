"""The CPU backend: a model on the machine's own cores.

Kernels are C++ built for this very processor at first use (or ahead, by ``python -m isthmus_cpu.build``);
where there is no compiler, plain torch serves, more slowly.

Options: ``kernels`` is auto, off (plain torch) or require (an error where kernels cannot be had);
``threads`` is a number, by default the cores that this process may use.

Weights are bfloat16 or float32.  A checkpoint in float16 is kept in bfloat16, which has its range but
three bits less; ask for float32 to keep every bit.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final

from isthmus.contract import DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus.hookspecs import hookimpl
from isthmus_cpu.machine import memory_bytes, processor_name, usable_cores

if TYPE_CHECKING:
    from isthmus.contract import Backend

CONTRACT_VERSION: Final = (1, 0)


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailable("the cpu backend needs torch; try: pip install 'isthmus-engine[cpu]'")
    return [
        DeviceInfo(
            backend="cpu",
            index=0,
            name=processor_name(),
            memory_bytes=memory_bytes(),
            details=(("cores", str(usable_cores())),),
            host=True,
        )
    ]


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> Backend:
    from isthmus_cpu.backend import open_backend
    from isthmus_cpu.options import CpuOptions

    return open_backend(device, CpuOptions.parse(options))
