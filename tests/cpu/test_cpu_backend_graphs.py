"""Tapes: capture, the arena they run in, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.contract import Limits, StepInputs, StepShape
from isthmus.errors import BackendUnavailable, Unsupported
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceInputs
from isthmus.sampling_params import RowSampling
from isthmus_cpu.arena import Life, place
from isthmus_cpu.build import kernels_library
from isthmus_cpu.graphs import Tape, TapeGraphs
from isthmus_cpu.inputs import PanelInputs
from isthmus_cpu.library import Library, Pool
from isthmus_cpu.ops import PanelOps
from isthmus_cpu.runner import Runner

HIDDEN, INNER, VOCAB, TOKENS = 40, 64, 30, 90
LIMITS = Limits(max_rows=4, max_tokens=TOKENS, max_model_len=200, block_size=16, num_blocks=60, vocab_size=VOCAB)


class Rig:
    """A two-step MLP over embedded tokens: enough of a model for a tape."""

    def __init__(self, threads: int) -> None:
        library = Library(kernels_library())
        self.pool = Pool(library, threads)
        self.runner = Runner(self.pool)
        self.ops = PanelOps(library, self.runner, threads)
        self.inputs = PanelInputs(library)
        self.state = self.inputs.allocate(LIMITS)
        self.graphs = TapeGraphs(self.pool, self.runner, self.inputs, library.panel)

        def weight(*shape: int, seed: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5

        self.table = self.ops.prepare_table(weight(VOCAB, HIDDEN, seed=1))
        self.gate_up = self.ops.prepare_linear(weight(2 * INNER, HIDDEN, seed=2))
        self.down = self.ops.prepare_linear(weight(HIDDEN, INNER, seed=3))
        self.norm = torch.ones(HIDDEN)

    def step(self, inputs: StepInputs) -> Tensor:
        residual = self.ops.embed(inputs.token_ids, self.table, 1.0)
        x = self.ops.rms_norm(residual, self.norm, 1e-5)
        for _ in range(3):
            delta = self.ops.linear(self.ops.gated_activation(self.ops.linear(x, self.gate_up), "silu"), self.down)
            x, residual = self.ops.add_rms_norm(delta, residual, self.norm, 1e-5)
        return self.ops.take_rows(self.ops.add(x, residual), inputs.sample_tokens)

    def prepare(self, lengths: list[int], seed: int = 0) -> StepInputs:
        plan = plan_of(lengths, seed)
        self.inputs.upload(plan, self.state)
        return self.inputs.build(self.state, StepShape(plan.num_tokens, plan.num_spans, plan.num_spans))

    def close(self) -> None:
        self.ops.close()
        self.pool.close()


@pytest.fixture(scope="module", params=[1, 2, 3])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    try:
        made = Rig(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def plan_of(lengths: list[int], seed: int = 0, starts: bool = True) -> StepPlan:
    numbers = np.random.default_rng(seed)
    return StepPlan(
        step=0,
        starts=tuple(
            RowStart(
                row=row,
                tokens=numbers.integers(0, VOCAB, length).astype(np.int32),
                num_prompt_tokens=length,
                sampling=RowSampling(max_tokens=1),
            )
            for row, length in enumerate(lengths)
        ),
        block_rows=np.array([0, 0, 1, 2], np.int32),
        block_indices=np.array([0, 1, 0, 0], np.int32),
        block_ids=np.array([9, 4, 7, 30], np.int32),
        span_rows=np.arange(len(lengths), dtype=np.int32)[::-1].copy(),
        span_starts=np.zeros(len(lengths), np.int32),
        span_lengths=np.array(lengths[::-1], np.int32),
        span_samples=np.ones(len(lengths), np.bool_),
    )


def test_one_capture_serves_every_size(rig: Rig) -> None:
    inputs = rig.prepare([30, 30, 29, 1])
    tape = rig.graphs.capture(lambda: rig.step(inputs), TOKENS)
    assert torch.equal(tape.replay(inputs.num_tokens), rig.step(inputs))
    for seed, lengths in enumerate(([1], [1, 1, 1], [7, 1], [64, 2, 3, 1], [90])):
        fresh = rig.prepare(list(lengths), seed)
        eager = rig.step(fresh)
        assert torch.equal(tape.replay(fresh.num_tokens)[: len(lengths)], eager)


def test_gates_are_done_by_the_linear_before_them(rig: Rig) -> None:
    inputs = rig.prepare([TOKENS])
    tape = rig.graphs.capture(lambda: rig.step(inputs), TOKENS)
    assert isinstance(tape, Tape)
    assert len(tape) == 2 + 3 * 3 + 2


def test_a_gates_input_that_is_returned_is_still_written(rig: Rig) -> None:
    inputs = rig.prepare([9])

    def step() -> tuple[Tensor, Tensor]:
        gate_up = rig.ops.linear(rig.ops.embed(inputs.token_ids, rig.table, 1.0), rig.gate_up)
        return gate_up, rig.ops.gated_activation(gate_up, "gelu_tanh")

    tape = rig.graphs.capture(step, 9)
    for captured, eager in zip(tape.replay(9), step(), strict=True):
        assert torch.equal(captured, eager)


@pytest.mark.parametrize("step", [lambda x: x * 2, lambda x: x[0, 0].item(), lambda x: x.add_(1), lambda x: x.clone()])
def test_torch_arithmetic_cannot_be_captured(rig: Rig, step: object) -> None:
    inputs = rig.prepare([5])
    with pytest.raises(Unsupported, match="may not call torch"):
        rig.graphs.capture(lambda: step(rig.ops.embed(inputs.token_ids, rig.table, 1.0)), 5)  # type: ignore[operator]
    assert rig.step(inputs).isfinite().all(), "operations run again after a failed capture"


def test_a_tensor_from_elsewhere_cannot_be_captured(rig: Rig) -> None:
    rig.prepare([5])
    x = torch.zeros(5, HIDDEN)
    with pytest.raises(Unsupported, match="no tensor but its inputs"):
        rig.graphs.capture(lambda: rig.ops.linear(x, rig.gate_up), 5)


def test_lives_that_overlap_do_not_share_memory() -> None:
    chooser = random.Random(1)
    for _ in range(50):
        lives = []
        for _ in range(chooser.randint(1, 30)):
            first = chooser.randint(0, 20)
            lives.append(Life(first, first + chooser.randint(0, 6), chooser.randint(1, 5000)))
        offsets, total = place(lives)
        for a, (life, offset) in enumerate(zip(lives, offsets, strict=True)):
            assert offset % 64 == 0 and offset + life.nbytes <= total
            for other, where in list(zip(lives, offsets, strict=True))[:a]:
                apart = offset + life.nbytes <= where or where + other.nbytes <= offset
                assert apart or life.last < other.first or other.last < life.first
        assert total <= sum(-(-life.nbytes // 64) * 64 for life in lives)


def test_memory_is_used_again() -> None:
    chain = [Life(n, n + 1, 640) for n in range(100)]
    assert place(chain)[1] == 2 * 640


@pytest.mark.parametrize("padding", [0, 3])
def test_inputs_are_the_references(rig: Rig, padding: int) -> None:
    reference = ReferenceInputs(torch.device("cpu"))
    states = (rig.inputs.allocate(LIMITS), reference.allocate(LIMITS))
    plans = [plan_of([20, 3, 1]), plan_of([5], seed=3)]
    decode = StepPlan(
        step=2,
        block_rows=np.array([1], np.int32),
        block_indices=np.array([1], np.int32),
        block_ids=np.array([17], np.int32),
        span_rows=np.array([1, 0], np.int32),
        span_starts=np.array([18, 30], np.int32),
        span_lengths=np.array([1, 1], np.int32),
        span_samples=np.array([True, False]),
    )
    for plan in [*plans, decode, *plans]:
        built = []
        for part, state in zip((rig.inputs, reference), states, strict=True):
            part.upload(plan, state)
            sizes = (plan.num_tokens + padding, min(plan.num_spans + padding, 4), int(plan.span_samples.sum()))
            built.append(part.build(state, StepShape(*sizes)))
        for name in StepInputs.__slots__:
            ours, theirs = (getattr(inputs, name) for inputs in built)
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, name
