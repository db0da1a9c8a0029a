"""Captured graphs against eager steps, over the same buffers and the same cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.contract import GraphScope, Limits, ShapePolicy, StepInputs, StepShape
from isthmus.errors import Unsupported
from isthmus.model.decoder import Decoder
from isthmus.model.source import read_spec, resolve_model
from isthmus.model.weights import load_decoder
from isthmus.plan import StepPlan
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.golden import require_close
from isthmus.testing.suite.steps import Span, Starting, Stepper, fitting, plan_of
from isthmus.testing.tiny_model import MAX_LEN, write_tiny_model

pytestmark = [pytest.mark.requires_parts]
DTYPES = ("float32", "bfloat16", "float16")


class Bench:
    """A tiny model on the device, and rows with a past for it to decode."""

    def __init__(self, device: DeviceUnderTest, folder: Path, rows: int = 4) -> None:
        capabilities = device.capabilities
        self.device, self.rows = device, min(rows, fitting(capabilities, rows=rows, tokens=64)[0])
        self.dtype = next(name for name in DTYPES if name in capabilities.dtypes)
        kv_dtype = next(name for name in DTYPES if name in capabilities.kv_dtypes)
        source = resolve_model(str(folder))
        spec = read_spec(source)
        _, tokens = fitting(capabilities, rows=self.rows, tokens=64)
        size = capabilities.block_sizes[0]
        self.per_row = -(-MAX_LEN // size)
        limits = Limits(
            max_rows=self.rows,
            max_tokens=tokens,
            max_model_len=MAX_LEN,
            block_size=size,
            num_blocks=1 + self.rows * self.per_row,
            vocab_size=spec.vocab_size,
        )
        self.model: Decoder = device.run(
            lambda: load_decoder(source, spec, device.parts, self.dtype, MAX_LEN, progress=False)
        )
        layers = [layer.attention for layer in spec.layers]
        self.caches = device.run(lambda: device.parts.attention.allocate(layers, limits, kv_dtype))
        self.stepper = Stepper(device, limits)
        self.lengths = [0] * self.rows

    def prefill(self, length: int, **sampling: Any) -> None:
        """Each row computes a prompt of its own, one after another, so that any span mix will do."""
        rng = np.random.default_rng(5)
        for row in range(self.rows):
            tokens = rng.integers(0, 200, length).tolist()
            blocks = [1 + row + self.rows * place for place in range(self.per_row)]
            parameters = RowSampling(max_tokens=50, seed=row, **sampling)
            starts = {row: Starting(tokens, blocks, sampling=parameters)}
            self.eager(plan_of(row, [Span(row, 0, length)], starts))
        self.lengths = [length] * self.rows

    def decode(self, count: int) -> StepPlan:
        return plan_of(100 + sum(self.lengths), [Span(row, self.lengths[row], 1) for row in range(count)])

    def eager(self, plan: StepPlan) -> tuple[Tensor, list[int]]:
        """Logits and tokens of the plan."""

        def step() -> tuple[Tensor, Tensor]:
            inputs = self.stepper.prepare(plan)
            logits = self.logits(inputs)
            kept = logits.clone()
            return kept, self.sample(logits, inputs)

        logits, tokens = self.device.run(step)
        count = int(plan.span_samples.sum())
        return logits[:count], tokens[:count].cpu().tolist()

    def logits(self, inputs: StepInputs) -> Tensor:
        return self.model.logits(self.model.forward(inputs, self.caches), inputs.sample_tokens)

    def sample(self, logits: Tensor, inputs: StepInputs) -> Tensor:
        stepper = self.stepper
        return self.device.parts.sampling.sample(logits, inputs, stepper.rows, stepper.state, -1).tokens

    def shape(self, size: int) -> StepShape:
        """Of a step in which ``size`` rows decode, whatever their lengths."""
        spans = [Span(row, MAX_LEN - 1, 1) for row in range(size)]
        return self.device.padding(self.stepper.limits).shape(plan_of(0, spans))

    def build(self, shape: StepShape) -> StepInputs:
        """Inputs as a captured step takes them: its counts, and bounds instead of the host's integers."""
        inputs = self.device.parts.inputs.build(self.stepper.rows, shape)
        if self.device.capabilities.shapes is ShapePolicy.BUCKETED:
            return inputs
        return dataclasses.replace(inputs, max_query_length=1, max_context_length=MAX_LEN)

    def upload(self, plan: StepPlan) -> None:
        self.device.parts.inputs.upload(plan, self.stepper.rows)
        self.device.parts.sampling.apply(self.stepper.state, plan)


@pytest.fixture
def bench(isthmus_device: DeviceUnderTest, tmp_path: Path) -> Bench:
    return Bench(isthmus_device, write_tiny_model(tmp_path))


def test_capture_where_none_is_declared_is_unsupported(isthmus_device: DeviceUnderTest) -> None:
    if isthmus_device.capabilities.graph_scope is GraphScope.NONE:
        with pytest.raises(Unsupported):
            isthmus_device.parts.graphs.capture(lambda: torch.zeros(1), 1)


@pytest.mark.requires_capability("graph_scope=forward")
def test_a_replayed_forward_gives_the_eager_logits(bench: Bench) -> None:
    """Hidden states of one graph for every size, or logits of a graph of this size."""
    any_size = bench.device.capabilities.graph_any_size
    bench.prefill(20)
    graphs, shape = bench.device.parts.graphs, bench.shape(bench.rows)

    def capture() -> Any:
        bench.upload(bench.decode(bench.rows))
        if not any_size:
            return graphs.capture(lambda: bench.logits(bench.build(shape)), bench.rows)
        inputs = bench.build(shape)
        return graphs.capture(lambda: bench.model.forward(inputs, bench.caches), bench.rows)

    graph = bench.device.run(capture)
    for length in (20, 21, 22):
        bench.lengths = [length] * bench.rows
        plan = bench.decode(bench.rows)
        expected, tokens = bench.eager(plan)

        def replay(plan: StepPlan = plan) -> Tensor:
            bench.upload(plan)
            inputs = bench.build(shape) if any_size else None
            output: Tensor = graph.replay(bench.rows)
            logits = bench.model.logits(output, inputs.sample_tokens) if inputs is not None else output
            return logits[: bench.rows].clone()

        found = bench.device.run(replay)
        require_close(found, expected.cpu().double(), bench.dtype, f"replayed logits at position {length}")
        assert found.argmax(-1).tolist() == tokens


@pytest.mark.requires_capability("graph_scope=step")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_replayed_steps_give_the_eager_tokens(bench: Bench, sampling: dict[str, Any]) -> None:
    """Whole steps: inputs are built, the model runs and samples, each replay reading the last one's tokens."""
    bench.prefill(20, **sampling)
    wanted: list[list[int]] = []
    for length in range(20, 26):
        bench.lengths = [length] * bench.rows
        wanted.append(bench.eager(bench.decode(bench.rows))[1])
    bench.prefill(20, **sampling)
    sampler, shape = bench.device.parts.sampling, bench.shape(bench.rows)

    def capture() -> Any:
        bench.upload(bench.decode(bench.rows))

        def step() -> Tensor:
            inputs = bench.build(shape)
            return bench.sample(bench.logits(inputs), inputs)

        return bench.device.parts.graphs.capture(step, bench.rows)

    graph = bench.device.run(capture)
    bench.prefill(20, **sampling)
    found: list[list[int]] = []
    for length in range(20, 26):
        bench.lengths = [length] * bench.rows
        plan = bench.decode(bench.rows)

        def replay(plan: StepPlan = plan) -> list[int]:
            bench.upload(plan)
            if hasattr(sampler, "replayable") and not sampler.replayable(bench.stepper.state):
                inputs = bench.build(shape)
                tokens = bench.sample(bench.logits(inputs), inputs)
            else:
                tokens = graph.replay(bench.rows)
            return list(bench.device.parts.memory.fetch([tokens[: bench.rows]]).result()[0])

        found.append([int(token) for token in bench.device.run(replay)])
    assert found == wanted
