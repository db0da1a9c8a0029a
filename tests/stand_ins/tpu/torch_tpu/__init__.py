"""A stand-in for Google's TorchTPU (torch_tpu 0.2), over the fake device `tpu`: no Google software is here.

It imitates the names that an inference backend uses, as the wheel on PyPI shows them (torch_tpu/_loader.py,
torch_tpu/_internal/public_api.py and _internal/device/_device_module.py).  Importing it makes `torch.device("tpu")`,
`torch.tpu` and the Dynamo backend `tpu` available; where no TPU is found (here: FAKE_DEVICE_COUNT=0) it registers no
device, as the real one.  What every device has is asked of `torch.accelerator`: the functions of that kind in
`torch.tpu` raise and say so.  `get_device_name` and `get_device_properties` warn once that they are experimental.

The real package is also loaded by importing torch, has a module `torch.tpu` even without a device, makes `tpu` the
default backend of torch.compile and compiles dynamic shapes into buckets; none of that is here, and this backend
refuses symbolic shapes.  `torch.accelerator` gets its figures of the fake device by being patched, where the real
device answers from C++.
"""

import os
import sys
import warnings
from typing import Any

import torch
from fake_device import install

_EXPERIMENTAL = ("get_device_name", "get_device_properties")
_INTERNAL = ("is_available", "device_count", "synchronize")

__version__ = "0.2.0"


def _load() -> None:
    device = install("tpu", kind="TPU v6e", provides=("set_device", *_EXPERIMENTAL, *_INTERNAL))
    for name in _EXPERIMENTAL:
        setattr(torch.tpu, name, _experimental(name, getattr(torch.tpu, name)))
    for name in _INTERNAL:
        setattr(torch.tpu, name, _internal(name, getattr(torch.tpu, name)))
    accelerator: Any = torch.accelerator
    accelerator.synchronize = lambda device_index=None: device.synchronize()
    accelerator.get_memory_info = lambda device_index=None: (
        device.total_memory - device.allocated_bytes,
        device.total_memory,
    )


def _internal(name: str, function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].partition(".")[0] == "torch":
            return function(*arguments)
        raise RuntimeError(
            f"{name} is internal to TorchTPU and can only be called by the PyTorch framework (torch and torch_tpu). "
            f"Use torch.accelerator.{name} instead."
        )

    return call


def _experimental(name: str, function: Any) -> Any:
    warned: list[str] = []

    def call(device: Any = None) -> Any:
        if not warned:
            warned.append(name)
            said = (
                f"{name} is experimental and subject to change: {name}() is experimental and subject to change without"
            )
            warnings.warn(f"<TorchTpu/ApiStage/ExperimentalApi/> {said} notice.", UserWarning, stacklevel=2)
        return function(device)

    return call


if os.environ.get("FAKE_DEVICE_COUNT", "1") != "0":
    _load()
