"""A stand-in for AWS's TorchNeuron (torch-neuronx 2.13 and later), over the fake device `neuron`: no AWS software.

It imitates the names that an inference backend uses, as the package's public source shows them (aws-neuron/
torch-neuronx: torch_neuronx/__init__.py, torch_neuronx/neuron, torch_neuronx/memory): importing it makes
`torch.device("neuron")`, `torch.neuron` and the Dynamo backend `neuron` available.  There is no `mem_get_info`: total
memory is `get_device_properties().total_memory`, what is in use `memory_allocated()`.

The backend refuses symbolic shapes (the real one rejects `dynamic=True`) and graph breaks, which the real one only
advises against.  The XLA line of torch-neuronx (2.9 and before), for Inferentia 2 and Trainium 1, is another API.
"""

from typing import Any

import torch
from fake_device import install

_FUNCTIONS = (
    "is_available",
    "device_count",
    "set_device",
    "synchronize",
    "get_device_properties",
    "memory_allocated",
    "max_memory_allocated",
    "reset_peak_memory_stats",
    "empty_cache",
)

__version__ = "2.13.3"

_device = install("neuron", kind="trn2", provides=_FUNCTIONS)

device_count = torch.neuron.device_count
current_device = torch.neuron.current_device
set_device = torch.neuron.set_device
synchronize = torch.neuron.synchronize
get_device_properties = torch.neuron.get_device_properties
memory_allocated = torch.neuron.memory_allocated
max_memory_allocated = torch.neuron.max_memory_allocated
reset_peak_memory_stats = torch.neuron.reset_peak_memory_stats
empty_cache = torch.neuron.empty_cache


def _device_name(device: Any = 0) -> str:
    """TorchNeuron names a device by its index, not by its kind."""
    return str(device) if isinstance(device, torch.device) else f"neuron:{device}"


def memory_stats(device: Any = None) -> dict[str, dict[str, int]]:
    """Those of TorchNeuron's statistics that the fake device keeps, in bytes."""
    return {"allocated_bytes": {"current": _device.allocated_bytes, "peak": _device.peak_bytes}}


class Event:
    """Of the one stream, which runs at once: what was recorded has passed."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


torch.neuron.Event = Event
torch.neuron.get_device_name = _device_name
torch.neuron.memory_stats = memory_stats
