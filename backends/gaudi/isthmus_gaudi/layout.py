"""Which attention serves a step: the flat one for single tokens, tiles over rows for longer spans."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from isthmus.contract import AttentionSpec, Limits
from isthmus_gaudi.flat_attention import FlatBlocks, flat_paged_attention, list_blocks, most_blocks
from isthmus_static.layout import HostStep, PagedCache, StaticStepInputs
from isthmus_static.row_attention import RowLayout, RowPlan
from isthmus_static.step_buffer import StepBuffer


@dataclass(frozen=True, slots=True)
class FlatPlan:
    """A step of single tokens, and the lists of its blocks that layers have asked for, by window."""

    inputs: StaticStepInputs
    blocks: int
    block_size: int
    _lists: dict[int, FlatBlocks] = field(default_factory=dict)

    def seen_within(self, window: int) -> FlatBlocks:
        if window not in self._lists:
            inputs = self.inputs
            count = most_blocks(self.blocks, inputs.num_spans, self.block_size, window)
            self._lists[window] = list_blocks(
                inputs.block_tables, inputs.span_rows, inputs.context_lengths, count, self.block_size, window
            )
        return self._lists[window]


class FlatLayout:
    """:class:`isthmus_static.layout.AttentionLayout`, for block buckets that count the blocks of all rows.

    Single tokens need no array of the host's.  Longer spans attend by rows, each over as many blocks as the bucket
    has, up to a whole row.
    """

    def __init__(self) -> None:
        self._rows = RowLayout()

    def sizes(self, limits: Limits) -> dict[str, int]:
        return self._rows.sizes(limits)

    def fill(self, buffer: StepBuffer, step: HostStep, limits: Limits) -> None:
        if step.offsets[-1] > len(step.rows):
            self._rows.fill(buffer, step, limits)

    def plan(self, inputs: StaticStepInputs, buffer: StepBuffer, limits: Limits) -> FlatPlan | RowPlan:
        if not inputs.shape.single:
            return self._rows.plan(inputs, buffer, limits)
        # Without buckets of blocks, as many as there may be.
        blocks = inputs.shape.blocks or inputs.num_spans * limits.max_blocks_per_row
        return FlatPlan(inputs, blocks, limits.block_size)

    def attend(self, query: Tensor, cache: PagedCache, layer: AttentionSpec, plan: FlatPlan | RowPlan) -> Tensor:
        if isinstance(plan, RowPlan):
            return self._rows.attend(query, cache, layer, plan)
        blocks = plan.seen_within(layer.window)
        return flat_paged_attention(query, cache.keys, cache.values, blocks, plan.block_size, layer)
