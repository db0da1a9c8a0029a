"""What the host tells the device in a step: named arrays in one buffer of integers and one of floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.plan import Float32Array, Int32Array


class StepBuffer:
    """Host arrays of fixed places, and their copies on the device.

    :meth:`flush` brings up what was written since the last one, in one copy for the integers and one
    for the floats; each copy is a new tensor, so that a step still in flight keeps the one it reads.
    A captured graph takes :attr:`ints` and :attr:`floats` as they are when it is replayed.
    """

    ints: Tensor  # int32 [total]
    floats: Tensor  # float32 [total]

    def __init__(self, device: torch.device, ints: Mapping[str, int], floats: Mapping[str, int]) -> None:
        self._device = device
        self._int_places, self._host_ints = _placed(ints, np.int32)
        self._float_places, self._host_floats = _placed(floats, np.float32)
        self._new_ints = self._new_floats = True
        self.flush()

    def write(self, name: str, values: Int32Array | int, padding: int = 0) -> None:
        """Put ``values`` at the array's beginning and ``padding`` after them."""
        _write(self._host_ints[self._int_places[name]], values, padding)
        self._new_ints = True

    def write_floats(self, name: str, values: Float32Array, padding: float = 0.0) -> None:
        """As :meth:`write`; what has not changed is not brought up again."""
        where = self._host_floats[self._float_places[name]]
        before = where.copy()
        _write(where, values, padding)
        self._new_floats |= not np.array_equal(before, where)

    def flush(self) -> None:
        if self._new_ints:
            self.ints = torch.from_numpy(self._host_ints.copy()).to(self._device)
        if self._new_floats:
            self.floats = torch.from_numpy(self._host_floats.copy()).to(self._device)
        self._new_ints = self._new_floats = False

    def take(self, ints: Tensor, name: str, count: int) -> Tensor:
        """The first ``count`` integers of an array, out of a copy on the device."""
        begin = self._int_places[name].start
        return ints[begin : begin + count]

    def take_floats(self, floats: Tensor, name: str, count: int) -> Tensor:
        begin = self._float_places[name].start
        return floats[begin : begin + count]


def _placed(sizes: Mapping[str, int], dtype: type[np.generic]) -> tuple[dict[str, slice], NDArray[Any]]:
    places: dict[str, slice] = {}
    end = 0
    for name, size in sizes.items():
        places[name] = slice(end, end + size)
        end += size
    return places, np.zeros(max(end, 1), dtype)


def _write(where: NDArray[Any], values: NDArray[Any] | int, padding: float) -> None:
    if isinstance(values, int):
        where[0] = values
        return
    assert len(values) <= len(where), f"{len(values)} values do not fit into {len(where)} places"
    where[: len(values)] = values
    where[len(values) :] = padding
