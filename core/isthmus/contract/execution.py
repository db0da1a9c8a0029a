"""Backends that bring their own executor: tiers 2 and 3 of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from isthmus.config import EngineOptions
from isthmus.contract.capabilities import Capabilities, DeviceInfo
from isthmus.contract.parts import StepExecutor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the core must know of a model that it did not load itself."""

    model_name: str
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """Downgrades and choices made, each with its reason, for the log."""


@runtime_checkable
class ExecutorBackend(Protocol):
    """An open device that runs steps by itself.

    A tier 2 backend is a :class:`isthmus.contract.Backend` as well, and may leave some models to
    the core's executor.  A tier 3 backend has no parts: it takes plans and returns tokens.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> DeviceInfo: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def create_executor(self, options: EngineOptions) -> tuple[StepExecutor, ModelFacts] | None:
        """Load ``options.model`` and return what runs it, or ``None`` to leave it to the core.

        Called once, on the main thread of the process that runs the model.  The executor's
        ``limits`` are what the core plans within; it must hold to what ``options`` sets and may
        choose where an option is ``None``.  Raises :class:`isthmus.errors.ModelError` for a model
        it cannot load and :class:`isthmus.errors.Unsupported` for one it does not know.

        Since contract 1.0.
        """
        ...

    def providers(self) -> dict[str, str]:
        """As :meth:`isthmus.contract.Backend.providers`."""
        ...

    def close(self) -> None:
        """Give back everything; called after the executor's own ``close``."""
        ...
