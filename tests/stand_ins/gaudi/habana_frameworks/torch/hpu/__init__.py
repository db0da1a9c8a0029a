"""Stand-in for `habana_frameworks.torch.hpu`, which is also `torch.hpu`.

As in the bridge, `wrap_in_hpu_graph` exists in lazy mode alone (PT_HPU_LAZY_MODE=1), and `synchronize()` takes no
device.
"""

import torch
from fake_device import install

from habana_frameworks.torch.utils.internal import is_lazy

_FUNCTIONS = (
    "is_available",
    "device_count",
    "set_device",
    "get_device_name",
    "get_device_properties",
    "memory_allocated",
    "max_memory_allocated",
    "reset_peak_memory_stats",
    "mem_get_info",
)

_device = install("hpu", backends=("hpu_backend",), kind="GAUDI2", provides=_FUNCTIONS)

is_available = torch.hpu.is_available
device_count = torch.hpu.device_count
current_device = torch.hpu.current_device
set_device = torch.hpu.set_device
is_initialized = torch.hpu.is_initialized
get_device_name = torch.hpu.get_device_name
get_device_properties = torch.hpu.get_device_properties
memory_allocated = torch.hpu.memory_allocated
max_memory_allocated = torch.hpu.max_memory_allocated
reset_peak_memory_stats = torch.hpu.reset_peak_memory_stats
mem_get_info = torch.hpu.mem_get_info


def synchronize() -> None:
    _device.synchronize()


def memory_stats(device: object = None) -> dict[str, int]:
    """The byte counts of the bridge's statistics; its counts of allocations are left out."""
    return {"Limit": _device.total_memory, "InUse": _device.allocated_bytes, "MaxInUse": _device.peak_bytes}


class Stream:
    """The one there is; Dynamo looks for the class."""


class Event:
    """Of the one stream, which runs at once: what was recorded has passed."""

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


torch.hpu.synchronize = synchronize
torch.hpu.Stream = Stream
torch.hpu.Event = Event
torch.hpu.memory_stats = memory_stats

if is_lazy():
    from habana_frameworks.torch.hpu.graphs import wrap_in_hpu_graph

    torch.hpu.wrap_in_hpu_graph = wrap_in_hpu_graph
