"""A stand-in for Google's TorchTPU (torch_tpu 0.2), over the fake device `tpu`: no Google software is here.

It imitates the names that an inference backend uses, as the wheel on PyPI shows them (torch_tpu/_loader.py,
torch_tpu/_internal/public_api.py and _internal/device/_device_module.py).  Importing it makes `torch.device("tpu")`,
`torch.tpu` and the Dynamo backend `tpu` available; where no TPU is found (here: FAKE_DEVICE_COUNT=0) it registers no
device, as the real one.  `torch.tpu` reports no memory in use: only `get_device_properties().total_memory`, which
warns once that it is experimental.

The real package is also loaded by importing torch, makes `tpu` the default backend of torch.compile and compiles
dynamic shapes into buckets; none of that is here, and this backend refuses symbolic shapes.
"""

import os
import warnings
from typing import Any

import torch
from fake_device import install

_FUNCTIONS = ("is_available", "device_count", "set_device", "synchronize")

__version__ = "0.2.0"


def _load() -> None:
    install("tpu", kind="TPU v6e", provides=(*_FUNCTIONS, "get_device_name", "get_device_properties"))
    for name in ("get_device_name", "get_device_properties"):
        setattr(torch.tpu, name, _experimental(name, getattr(torch.tpu, name)))


def _experimental(name: str, function: Any) -> Any:
    warned: list[str] = []

    def call(device: Any = None) -> Any:
        if not warned:
            warned.append(name)
            warnings.warn(f"{name}() is experimental and subject to change without notice.", UserWarning, stacklevel=2)
        return function(device)

    return call


if os.environ.get("FAKE_DEVICE_COUNT", "1") != "0":
    _load()
