"""Order of steps and copies of results, where the host is the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from isthmus.contract import Pending
from isthmus.reference.memory import Done, host_available_bytes, host_total_bytes

T = TypeVar("T")


class Launched(Generic[T]):
    """A step on its way through the worker."""

    def __init__(self, step: Callable[[], T]) -> None:
        self._step: Callable[[], T] | None = step
        self._value: T | None = None
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        assert self._step is not None
        try:
            self._value = self._step()
        except BaseException as error:
            self._error = error
        self._step = None
        self._running.release()

    def result(self) -> T:
        with self._running:
            if self._error is not None:
                raise self._error
            return self._value  # type: ignore[return-value]  # a T wherever there is no error


class HostMemory:
    """:class:`isthmus.contract.Memory`.  Steps run in order on one thread, started with the first."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Launched[Any] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def available_bytes(self) -> int:
        return host_available_bytes()

    def total_bytes(self) -> int:
        return host_total_bytes()

    def launch(self, step: Callable[[], T]) -> Pending[T]:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="isthmus-device", daemon=True)
            self._worker.start()
        launched = Launched(step)
        self._steps.put(launched)
        return launched

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        # Copies, since the next step writes the same buffers.
        return Done([tensor.numpy().copy() for tensor in tensors])

    def synchronize(self) -> None:
        if self._worker is not None:
            self.launch(lambda: None).result()

    def close(self) -> None:
        """Wait for the steps launched, and end the worker."""
        if self._worker is not None:
            self._steps.put(None)
            self._worker.join()
            self._worker = None

    def _work(self) -> None:
        while (launched := self._steps.get()) is not None:
            launched.run()
            del launched  # what the step held must not live until the next one comes
