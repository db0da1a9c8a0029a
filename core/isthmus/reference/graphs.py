"""No graphs and one device: what a backend without either keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from isthmus.contract import CapturedGraph
from isthmus.errors import Unsupported

T = TypeVar("T")


class ReferenceGraphs:
    """:class:`isthmus.contract.Graphs` of a device that cannot capture."""

    def capture(self, step: Callable[[], T], num_tokens: int) -> CapturedGraph[T]:
        raise Unsupported("this backend captures no graphs; steps run eagerly")


class ReferenceCollectives:
    """:class:`isthmus.contract.Collectives` of a device alone."""

    @property
    def world_size(self) -> int:
        return 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x
