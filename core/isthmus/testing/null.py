"""A backend with no device and no model: a whole-model plugin (tier 3) that needs no torch.

It answers with printable bytes that depend on all tokens so far, and is strict about plans: a plan
that a real device would read wrongly raises :class:`PlanViolation` here.  Its "KV cache" holds, for
each slot, a hash of the tokens up to that position, so that a wrong block table, a wrong prefix hit
or a block given away too early is seen, and gives other tokens.

Asked for by name (``--device null``), never chosen by ``auto``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from isthmus.config import EngineOptions
from isthmus.contract import (
    CONTRACT_VERSION as CORE_CONTRACT_VERSION,
)
from isthmus.contract import (
    Capabilities,
    DeviceInfo,
    Limits,
    ModelFacts,
    StepExecutor,
)
from isthmus.errors import BackendError
from isthmus.hookspecs import hookimpl
from isthmus.testing.null_executor import NullBehaviour, NullExecutor, PlanViolation
from isthmus.testing.toy_model import EOS_TOKEN, VOCAB_SIZE

__all__ = ["CONTRACT_VERSION", "NullBackend", "NullBehaviour", "NullExecutor", "PlanViolation"]

CONTRACT_VERSION: Final = tuple(CORE_CONTRACT_VERSION)

DEVICE: Final = DeviceInfo(backend="null", index=0, name="no device", auto=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NullSettings:
    """Sizes where the engine's options leave them open."""

    steps_in_flight: int = 2
    max_rows: int = 256
    max_tokens: int = 8192
    max_model_len: int = 4096
    num_blocks: int = 8192
    load_s: float = 0.0
    """Seconds that loading the model takes."""


class NullBackend:
    def __init__(self, behaviour: NullBehaviour, settings: NullSettings) -> None:
        self._behaviour = behaviour
        self._settings = settings

    @property
    def name(self) -> str:
        return "null"

    @property
    def device(self) -> DeviceInfo:
        return DEVICE

    @property
    def capabilities(self) -> Capabilities:
        return capabilities(self._settings)

    def create_executor(self, options: EngineOptions) -> tuple[StepExecutor, ModelFacts]:
        asked, own = options.scheduler, self._settings
        time.sleep(own.load_s)
        limits = Limits(
            max_rows=asked.max_num_seqs or own.max_rows,
            max_tokens=asked.max_num_batched_tokens or own.max_tokens,
            max_model_len=options.model.max_model_len or own.max_model_len,
            block_size=options.cache.block_size or self.capabilities.block_sizes[0],
            num_blocks=options.cache.num_blocks or own.num_blocks,
            vocab_size=VOCAB_SIZE,
        )
        executor = NullExecutor(limits, self._behaviour, max_steps_in_flight=own.steps_in_flight)
        facts = ModelFacts(model_name=options.model.model, dtype="none", eos_token_ids=(EOS_TOKEN,))
        return executor, facts

    def providers(self) -> dict[str, str]:
        return {"model": "a hash of the tokens so far"}

    def close(self) -> None:
        pass


def capabilities(settings: NullSettings) -> Capabilities:
    return Capabilities(
        dtypes=("none",),
        kv_dtypes=("none",),
        block_sizes=(16, *(size for size in range(1, 129) if size != 16)),
        max_steps_in_flight=settings.steps_in_flight,
        sliding_window=True,
    )


@hookimpl
def isthmus_probe() -> list[DeviceInfo]:
    return [DEVICE]


@hookimpl
def isthmus_capabilities(device: DeviceInfo) -> Capabilities:
    return capabilities(NullSettings())


@hookimpl
def isthmus_open(device: DeviceInfo, options: dict[str, Any]) -> NullBackend:
    behaviour, rest = _read(NullBehaviour(), options)
    settings, unknown = _read(NullSettings(), rest)
    if unknown:
        known = sorted(f.name for record in (NullBehaviour, NullSettings) for f in fields(record))
        raise BackendError(f"backend 'null' has no option {sorted(unknown)[0]!r}; it has {', '.join(known)}")
    return NullBackend(behaviour, settings)


def _read(defaults: Any, options: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """``defaults`` with the options it knows, and the options it does not."""
    kinds = {f.name: type(getattr(defaults, f.name)) for f in fields(defaults)}
    changed: dict[str, Any] = {}
    for name in options.keys() & kinds.keys():
        text = options[name]
        try:
            changed[name] = text in ("1", "true", "yes") if kinds[name] is bool else kinds[name](text)
        except ValueError:
            raise BackendError(f"option {name} of backend 'null' is {text!r}; it must be a number") from None
    return replace(defaults, **changed), {name: text for name, text in options.items() if name not in kinds}
