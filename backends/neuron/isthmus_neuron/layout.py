"""Attention by rows, with block tables that fill whole tiles."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch.nn.functional as F

from isthmus.contract import Limits
from isthmus_neuron.capabilities import PARTITIONS, whole_tiles
from isthmus_static.layout import StaticStepInputs
from isthmus_static.row_attention import RowLayout, RowPlan
from isthmus_static.step_buffer import StepBuffer


class TiledRowLayout(RowLayout):
    """:class:`RowLayout` whose tables are as wide as :func:`isthmus_neuron.capabilities.context_blocks` wants.

    The buckets are so already; the longest context, which the limits set, need not be.  What is added names
    block 0, the spare one, at positions that no query sees.
    """

    def plan(self, inputs: StaticStepInputs, buffer: StepBuffer, limits: Limits) -> RowPlan:
        plan = super().plan(inputs, buffer, limits)
        width = plan.tables.shape[1]
        missing = whole_tiles(width, PARTITIONS // gcd(PARTITIONS, limits.block_size)) - width
        return replace(plan, tables=F.pad(plan.tables, (0, missing))) if missing else plan
