"""Input preparation against the reference's numpy, over a random sequence of plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.contract import Limits, StepShape
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceInputs
from isthmus.sampling_params import RowSampling
from isthmus_triton.inputs import TritonInputs

LIMITS = Limits(max_rows=5, max_tokens=128, max_model_len=100, block_size=16, num_blocks=60, vocab_size=1000)


def random_plan(rng: np.random.Generator, step: int, lengths: dict[int, int]) -> StepPlan:
    """Restart some rows, then compute some tokens of each chosen row and give it the blocks for them."""
    starts, appends, spans = [], [], []
    for row in rng.permutation(LIMITS.max_rows)[: rng.integers(1, LIMITS.max_rows + 1)].tolist():
        if row not in lengths or lengths[row] > 80 or rng.random() < 0.2:
            prompt = rng.integers(0, LIMITS.vocab_size, rng.integers(1, 40)).astype(np.int32)
            starts.append(
                RowStart(row=row, tokens=prompt, num_prompt_tokens=len(prompt), sampling=RowSampling(max_tokens=9))
            )
            lengths[row] = 0
        begin, length = lengths[row], int(rng.integers(1, 20))
        for place in range(-(-begin // LIMITS.block_size), -(-(begin + length) // LIMITS.block_size)):
            appends.append((row, place, int(rng.integers(1, LIMITS.num_blocks))))
        spans.append((row, begin, length, bool(rng.random() < 0.7)))
        lengths[row] = begin + length
    columns = np.array(appends, np.int32).reshape(-1, 3)
    return StepPlan(
        step=step,
        starts=tuple(starts),
        block_rows=columns[:, 0].copy(),
        block_indices=columns[:, 1].copy(),
        block_ids=columns[:, 2].copy(),
        span_rows=np.array([span[0] for span in spans], np.int32),
        span_starts=np.array([span[1] for span in spans], np.int32),
        span_lengths=np.array([span[2] for span in spans], np.int32),
        span_samples=np.array([span[3] for span in spans], np.bool_),
    )


@pytest.mark.parametrize("seed", range(3))
def test_same_inputs_as_the_reference(device: torch.device, seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, ours = ReferenceInputs(device), TritonInputs(device)
    expected_state, state = reference.allocate(LIMITS), ours.allocate(LIMITS)
    lengths: dict[int, int] = {}
    for step in range(8):
        plan = random_plan(rng, step, lengths)
        reference.upload(plan, expected_state)
        ours.upload(plan, state)
        samples = int(plan.span_samples.sum())
        sizes = (plan.num_tokens + int(rng.integers(0, 9)), LIMITS.max_rows, min(samples + 2, LIMITS.max_rows))
        expected, inputs = reference.build(expected_state, StepShape(*sizes)), ours.build(state, StepShape(*sizes))
        for name in ("tokens", "block_tables", "num_prompt_tokens"):
            torch.testing.assert_close(getattr(state, name), getattr(expected_state, name))
        real = plan.num_tokens
        for name in ("token_ids", "positions", "slots"):
            torch.testing.assert_close(getattr(inputs, name)[:real], getattr(expected, name)[:real], msg=name)
        for name in ("span_rows", "query_starts", "context_lengths", "sample_tokens", "sample_rows"):
            torch.testing.assert_close(getattr(inputs, name), getattr(expected, name), msg=name)
        # Padding: a real token id and position, in the spare block.
        assert ((inputs.slots[real:] >= 0) & (inputs.slots[real:] < LIMITS.block_size)).all()
        assert ((inputs.token_ids >= 0) & (inputs.token_ids < LIMITS.vocab_size)).all()
        assert (inputs.positions[real:] == 0).all()
        assert inputs.max_query_length == plan.span_lengths.max()


def test_tokens_are_read_when_the_step_runs(device: torch.device) -> None:
    """A token sampled after the upload is the one that is computed."""
    ours = TritonInputs(device)
    state = ours.allocate(LIMITS)
    prompt = np.array([7, 8], np.int32)
    plan = StepPlan(
        step=0,
        starts=(RowStart(row=2, tokens=prompt, num_prompt_tokens=2, sampling=RowSampling(max_tokens=9)),),
        span_rows=np.array([2], np.int32),
        span_starts=np.array([2], np.int32),
        span_lengths=np.array([1], np.int32),
        span_samples=np.array([True]),
    )
    ours.upload(plan, state)
    state.tokens[2, 2] = 99
    assert ours.build(state, StepShape(1, 1, 1)).token_ids.tolist() == [99]
