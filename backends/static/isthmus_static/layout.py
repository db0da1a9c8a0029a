"""What an attention needs beside a step's inputs: arrays made on the host, and how the device uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, StepInputs, StepShape
from isthmus.plan import Int32Array
from isthmus_static.step_buffer import StepBuffer


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer's keys and values, by slot: block_id * block_size + offset.

    A slot is [kv_heads, head_dim], or [width] with the heads side by side and zeros after them."""

    keys: Tensor  # [num_blocks * block_size, *slot]
    values: Tensor  # [num_blocks * block_size, *slot]


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step as the host knows it."""

    rows: Int32Array  # [spans]
    offsets: Int32Array  # [spans + 1] into the step's tokens
    starts: Int32Array  # [spans] first position computed
    contexts: Int32Array  # [spans] keys that a span's last token sees
    block_tables: Int32Array  # [max_rows + 1, max_blocks_per_row]


@dataclass(slots=True, kw_only=True)
class StaticStepInputs(StepInputs):
    """Of a compiled step: every count is that of its shape."""

    shape: StepShape
    ints: Tensor
    """The step's buffer on the device, for the layout's own arrays."""


class AttentionLayout(Protocol):
    """One way to attend over paged keys in static shapes."""

    def sizes(self, limits: Limits) -> dict[str, int]:
        """Names and lengths of the arrays that :meth:`fill` writes."""
        ...

    def fill(self, buffer: StepBuffer, step: HostStep, limits: Limits) -> None:
        """Write them for a step, padding included."""
        ...

    def plan(self, inputs: StaticStepInputs, buffer: StepBuffer, limits: Limits) -> Any:
        """What all layers share, on the device; traced."""
        ...

    def attend(self, query: Tensor, cache: PagedCache, layer: AttentionSpec, plan: Any) -> Tensor:
        """As :meth:`isthmus.contract.Attention.attend`; traced."""
        ...
