"""The compiled half of the device, by ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final

import torch

FIELDS: Final = ("in_use", "peak", "limit", "allocations", "to_host", "to_host_bytes", "from_host", "from_host_bytes")
"""In the order of ``fake_device_read``."""


class Native:
    """Typed access to the functions at the end of ``device.cpp``."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._library.fake_device_ops.restype = ctypes.c_char_p
        for name in ("fake_device_set_limit", "fake_device_fail_next_over"):
            getattr(self._library, name).argtypes = [ctypes.c_int64]

    def read(self) -> dict[str, int]:
        values = (ctypes.c_int64 * len(FIELDS))()
        self._library.fake_device_read(values)
        return dict(zip(FIELDS, values, strict=True))

    def ops(self, *, in_graphs: bool) -> dict[str, int]:
        lines = self._library.fake_device_ops(int(in_graphs)).decode().splitlines()
        return {name: int(count) for name, _, count in (line.partition(" ") for line in lines)}

    def reset_counts(self) -> None:
        self._library.fake_device_reset_counts()

    def reset_peak(self) -> None:
        self._library.fake_device_reset_peak()

    def set_limit(self, num_bytes: int) -> None:
        self._library.fake_device_set_limit(num_bytes)

    def fail_next_over(self, num_bytes: int) -> None:
        self._library.fake_device_fail_next_over(num_bytes)

    def enter_graph(self) -> None:
        self._library.fake_device_graphs(1)

    def leave_graph(self) -> None:
        self._library.fake_device_graphs(-1)

    def is_in_graph(self) -> bool:
        return self._library.fake_device_graphs(0) > 0
