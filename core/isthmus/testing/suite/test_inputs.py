"""A plan on the device: tokens, positions, slots and offsets, padded, and read when they are due."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.contract import Limits, StepInputs
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.steps import Span, Starting, Stepper, fitting, mixable, plan_of

pytestmark = [pytest.mark.requires_parts, pytest.mark.mandatory]

MAX_LEN = 200


@pytest.fixture
def stepper(isthmus_device: DeviceUnderTest) -> Stepper:
    capabilities = isthmus_device.capabilities
    rows, tokens = fitting(capabilities, rows=5, tokens=256)
    size = capabilities.block_sizes[0]
    limits = Limits(
        max_rows=rows, max_tokens=tokens, max_model_len=MAX_LEN, block_size=size, num_blocks=200, vocab_size=900
    )
    return Stepper(isthmus_device, limits)


def prompt(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 900, count)]


def blocks(stepper: Stepper, tokens: int, first: int) -> list[int]:
    """So many blocks, descending, so that neighbours in a table are none in memory."""
    return list(range(first, first - -(-tokens // stepper.limits.block_size), -1))


def test_a_mixture_of_spans(stepper: Stepper) -> None:
    lengths = mixable(stepper.device.capabilities, [5, 33, 17])[: stepper.limits.max_rows]
    tables = {row: blocks(stepper, length, 60 + 30 * row) for row, length in enumerate(lengths)}
    prompts = {row: prompt(length, row) for row, length in enumerate(lengths)}
    spans = [Span(row, 0, length, samples=row != 1) for row, length in enumerate(lengths)]
    plan = plan_of(0, spans, {row: Starting(prompts[row], tables[row]) for row in tables})
    inputs = stepper.device.run(lambda: stepper.prepare(plan))

    size, count = stepper.limits.block_size, sum(lengths)
    positions = [position for length in lengths for position in range(length)]
    slots = [
        tables[row][position // size] * size + position % size
        for row, length in enumerate(lengths)
        for position in range(length)
    ]
    equal(inputs.token_ids[:count], [token for row in prompts for token in prompts[row]], torch.int32, "token_ids")
    equal(inputs.positions[:count], positions, torch.int32, "positions")
    equal(inputs.slots[:count], slots, torch.int64, "slots")
    equal(inputs.span_rows[: len(spans)], [span.row for span in spans], torch.int32, "span_rows")
    ends = np.cumsum([0, *lengths]).tolist()
    equal(inputs.query_starts[: len(spans) + 1], ends, torch.int32, "query_starts")
    equal(inputs.context_lengths[: len(spans)], lengths, torch.int32, "context_lengths")
    sampled = [span.row for span in spans if span.samples]
    equal(inputs.sample_rows[: len(sampled)], sampled, torch.int32, "sample_rows")
    equal(inputs.sample_tokens[: len(sampled)], [ends[row + 1] - 1 for row in sampled], torch.int32, "sample_tokens")
    for row, table in tables.items():
        equal(inputs.block_tables[row, : len(table)], table, torch.int32, f"the block table of row {row}")
    assert inputs.num_tokens >= count and inputs.num_spans >= len(spans)
    assert inputs.max_query_length >= max(lengths) and inputs.max_context_length >= max(lengths)


def test_padding_belongs_to_nobody(stepper: Stepper) -> None:
    """Padded tokens write to the spare block, padded spans are empty, padded samples are of the padding row."""
    limits, device = stepper.limits, stepper.device
    starts = {0: Starting(prompt(3), blocks(stepper, 3, 9))}
    plan = plan_of(0, [Span(0, 0, 3)], starts)
    parts = device.parts
    least = device.padding(limits).shape(plan)
    shape = least._replace(tokens=limits.max_tokens, spans=limits.max_rows, samples=limits.max_rows)

    def build() -> StepInputs:
        parts.inputs.upload(plan, stepper.rows)
        return parts.inputs.build(stepper.rows, shape)

    inputs = device.run(build)
    assert inputs.token_ids.shape == (limits.max_tokens,) and inputs.span_rows.shape == (limits.max_rows,)
    padded = inputs.slots[3:].cpu()
    assert bool(((padded >= 0) & (padded < limits.block_size)).all()), "padded tokens would write outside block 0"
    equal(inputs.query_starts[1:], [3] * limits.max_rows, torch.int32, "query_starts")
    equal(inputs.span_rows[1:], [limits.max_rows] * (limits.max_rows - 1), torch.int32, "span_rows")
    equal(inputs.sample_rows[1:], [limits.max_rows] * (limits.max_rows - 1), torch.int32, "sample_rows")
    ids = inputs.token_ids.cpu()
    assert bool(((ids >= 0) & (ids < limits.vocab_size)).all()), "padded tokens name no token of the vocabulary"


def test_a_token_is_read_when_the_step_runs(stepper: Stepper) -> None:
    """What a step in flight samples stands in ``device.tokens`` only after the next plan was uploaded."""
    device, parts = stepper.device, stepper.device.parts
    table = blocks(stepper, 8, 9)
    device.run(lambda: stepper.prepare(plan_of(0, [Span(0, 0, 5)], {0: Starting(prompt(5), table)})))

    def step() -> StepInputs:
        parts.inputs.upload(plan_of(1, [Span(0, 5, 1)]), stepper.rows)
        stepper.rows.tokens[0, 5] = 777
        shape = device.padding(stepper.limits).shape(plan_of(1, [Span(0, 5, 1)]))
        return parts.inputs.build(stepper.rows, shape)

    inputs = device.run(step)
    equal(inputs.token_ids[:1], [777], torch.int32, "the token sampled last")
    equal(inputs.positions[:1], [5], torch.int32, "its position")


def test_tables_grow_and_a_new_sequence_voids_its_row(stepper: Stepper) -> None:
    device, size = stepper.device, stepper.limits.block_size
    steps = min(size + 2, MAX_LEN - 2)
    device.run(lambda: stepper.prepare(plan_of(0, [Span(0, 0, 1)], {0: Starting([3], [40])})))
    table = [40]
    for position in range(1, steps):
        appends = []
        if position % size == 0:
            table.append(40 - len(table))
            appends = [(0, len(table) - 1, table[-1])]
        plan = plan_of(position, [Span(0, position, 1)], appends=appends)
        inputs = device.run(lambda plan=plan: stepper.prepare(plan))  # type: ignore[misc]
        equal(inputs.slots[:1], [table[-1] * size + position % size], torch.int64, f"the slot of position {position}")
    inputs = device.run(lambda: stepper.prepare(plan_of(steps, [Span(0, 0, 2)], {0: Starting([8, 9], [77, 76])})))
    equal(inputs.token_ids[:2], [8, 9], torch.int32, "the new sequence's tokens")
    assert int(inputs.block_tables[0, 0]) == 77, "the row still has its old block"


def test_plans_arrays_are_not_kept(stepper: Stepper) -> None:
    """The caller may drop or reuse them as soon as ``upload`` returns."""
    device, parts = stepper.device, stepper.device.parts
    plan = plan_of(0, [Span(0, 0, 3)], {0: Starting([5, 6, 7], blocks(stepper, 3, 9))})

    def step() -> StepInputs:
        parts.inputs.upload(plan, stepper.rows)
        plan.starts[0].tokens[:] = 0
        plan.span_lengths[:] = 1
        plan.block_ids[:] = 1
        return parts.inputs.build(stepper.rows, shape)

    shape = device.padding(stepper.limits).shape(plan)
    inputs = device.run(step)
    equal(inputs.token_ids[:3], [5, 6, 7], torch.int32, "token_ids")
    equal(inputs.query_starts[:2], [0, 3], torch.int32, "query_starts")


def equal(actual: torch.Tensor, expected: list[int], dtype: torch.dtype, what: str) -> None:
    assert actual.dtype == dtype, f"{what} is {actual.dtype}; it must be {dtype}"
    assert actual.cpu().tolist() == expected, f"{what}: {actual.cpu().tolist()[:20]}; it must be {expected[:20]}"
