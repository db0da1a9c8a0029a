"""The device that the certification kit tests, and how its parts are called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TypeVar, cast

import torch
from torch import Tensor

from isthmus.contract import Backend, Capabilities, ExecutorBackend, Limits
from isthmus.executor.dummy import dummy_plan
from isthmus.executor.shapes import Padding
from isthmus.plugins import LoadedPlugin, select_backend

T = TypeVar("T")


@dataclass(slots=True)
class DeviceUnderTest:
    """An open backend.  Parts are called as the core's executor calls them, inside ``memory.launch``."""

    name: str
    settings: dict[str, str]
    plugin: LoadedPlugin
    backend: Backend | ExecutorBackend
    model: str | None
    """What ``--isthmus-model`` gave."""
    threads_before: set[int | None]
    closed: bool = False
    hidden: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, settings: dict[str, str], model: str | None = None) -> DeviceUnderTest:
        """Raises an :class:`isthmus.errors.BackendError` where the device cannot be opened."""
        selection = select_backend(name)
        threads = {thread.ident for thread in threading.enumerate()}
        backend = selection.open(settings)
        return cls(name, settings, selection.plugin, backend, model, threads)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.backend.close()

    @property
    def has_parts(self) -> bool:
        return isinstance(self.backend, Backend)

    @property
    def parts(self) -> Backend:
        assert self.has_parts
        return cast(Backend, self.backend)

    @property
    def capabilities(self) -> Capabilities:
        return self.backend.capabilities

    def declares(self, capability: str) -> bool:
        """``"experts"``: true or not empty; ``"dtypes=float16"``: one of several."""
        name, _, wanted = capability.partition("=")
        assert name in {f.name for f in fields(Capabilities)}, f"there is no capability {name!r}"
        value = getattr(self.capabilities, name)
        if wanted:
            return wanted in value if isinstance(value, tuple) else str(value) == wanted
        return value != "none" if isinstance(value, StrEnum) else bool(value)

    def run(self, step: Callable[[], T]) -> T:
        """``step`` on the device, to its end."""

        def inside() -> T:
            with torch.inference_mode():
                return step()

        result = self.parts.memory.launch(inside).result()
        self.parts.memory.synchronize()
        return result

    def put(self, tensor: Tensor) -> Tensor:
        """A copy on the device, so that nothing the backend overwrites is the test's own."""
        return tensor.to(self.parts.memory.device, copy=True)

    def hidden_dtype(self, dtype: str) -> torch.dtype:
        """Of hidden tensors where weights are ``dtype``: what :meth:`Ops.embed` makes."""
        if dtype not in self.hidden:
            ops = self.parts.ops

            def embed() -> torch.dtype:
                table = ops.prepare_table(self.put(torch.zeros(32, 64, dtype=getattr(torch, dtype))))
                [tokens] = self.token_counts(1)
                return ops.embed(self.put(torch.zeros(tokens, dtype=torch.int32)), table, 1.0).dtype

            self.hidden[dtype] = self.run(embed)
        return self.hidden[dtype]

    def padding(self, limits: Limits) -> Padding:
        return Padding(self.capabilities, limits)

    def token_counts(self, *wanted: int) -> list[int]:
        """These numbers of tokens, or the buckets that hold them."""
        most = max(wanted)
        limits = Limits(
            max_rows=1, max_tokens=most, max_model_len=most, block_size=self.capabilities.block_sizes[0], num_blocks=2,
            vocab_size=1,
        )  # fmt: skip
        return sorted({self.padding(limits).shape(dummy_plan([count])).tokens for count in wanted})
