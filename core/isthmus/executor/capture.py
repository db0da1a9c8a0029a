"""Captures what steps replay: the largest first, everything that the backend's capabilities allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm  # type: ignore[import-untyped]

from isthmus.contract import (
    Backend,
    CapturedGraph,
    DeviceState,
    GraphScope,
    Limits,
    Sampled,
    ShapePolicy,
    StepInputs,
    StepShape,
)
from isthmus.executor.dummy import decode_plan, even_plan, plan_of_shape
from isthmus.executor.graphs import StepGraphs, capture_all
from isthmus.executor.shapes import Padding
from isthmus.plan import StepPlan

if TYPE_CHECKING:
    from torch import Tensor

    from isthmus.executor.executor import StepModel

STEP_TENSORS: Final = (
    "token_ids",
    "positions",
    "slots",
    "span_rows",
    "query_starts",
    "context_lengths",
    "sample_tokens",
    "sample_rows",
)
"""The tensors of :class:`StepInputs` that belong to a step alone, in the order in which a captured forward
returns them after its logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Everything that a captured step closes over."""

    backend: Backend
    model: StepModel
    limits: Limits
    padding: Padding
    device: DeviceState
    sampling_state: Any
    caches: Sequence[Any]

    def of(self, shapes: Sequence[StepShape], *, progress: bool) -> StepGraphs:
        """On the thread that :meth:`Memory.launch` chose.  ``progress`` draws a bar where shapes are bucketed."""
        capabilities = self.backend.capabilities
        scope, any_size = capabilities.graph_scope, capabilities.graph_any_size
        any_forward = any_size and scope is GraphScope.FORWARD
        one = self._any_forward if any_forward else self._step if scope is GraphScope.STEP else self._forward
        with tqdm(
            total=len(shapes), desc="compiling shapes", unit="shape", disable=not (progress and self.padding.bucketed)
        ) as bar:

            def capture(shape: StepShape) -> CapturedGraph[Any]:
                self._upload(shape)
                graph = one(shape)
                bar.update()
                return graph

            captured, notes, seconds = capture_all(shapes, capture)
        return StepGraphs(
            scope=scope,
            any_shape=any_forward,
            exact=capabilities.shapes is ShapePolicy.EXACT or any_size,
            captured=tuple(captured),
            capture_s=seconds,
            notes=notes,
        )

    def _upload(self, shape: StepShape) -> None:
        plan = self._plan(shape)
        self.backend.inputs.upload(plan, self.device)
        self.backend.sampling.apply(self.sampling_state, plan)

    def _plan(self, shape: StepShape) -> StepPlan:
        if self.padding.bucketed:
            return plan_of_shape(shape, self.limits)
        return decode_plan(shape.tokens) if shape.single else even_plan(shape)

    def _step(self, shape: StepShape) -> CapturedGraph[Sampled]:
        def step() -> Sampled:
            inputs, logits = self._logits(shape)
            return self.backend.sampling.sample(logits, inputs, self.device, self.sampling_state, -1)

        return self.backend.graphs.capture(step, shape.tokens)

    def _forward(self, shape: StepShape) -> CapturedGraph[tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            inputs, logits = self._logits(shape)
            return logits, *[getattr(inputs, name) for name in STEP_TENSORS]

        return self.backend.graphs.capture(step, shape.tokens)

    def _logits(self, shape: StepShape) -> tuple[StepInputs, Tensor]:
        inputs = self.backend.inputs.build(self.device, shape)
        if not self.padding.bucketed:
            inputs = self._bounded(inputs, shape)
        hidden = self.model.forward(inputs, self.caches, inputs.sample_tokens)
        return inputs, self.model.logits(hidden, None)

    def _any_forward(self, shape: StepShape) -> CapturedGraph[Tensor]:
        inputs = self._bounded(self.backend.inputs.build(self.device, shape), shape)
        return self.backend.graphs.capture(lambda: self.model.forward(inputs, self.caches), shape.tokens)

    def _bounded(self, inputs: StepInputs, shape: StepShape) -> StepInputs:
        """With upper bounds for what the host knows of the spans, since a graph is replayed with others."""
        return replace(
            inputs,
            max_query_length=shape.longest_span,
            max_context_length=self.limits.max_model_len,
            no_singles=False,
        )


def inputs_of(tensors: Sequence[Tensor], device: DeviceState, shape: StepShape, max_context_length: int) -> StepInputs:
    """What sampling reads, from what a captured forward returned after its logits."""
    named: dict[str, Any] = dict(zip(STEP_TENSORS, tensors, strict=True))
    return StepInputs(
        block_tables=device.block_tables,
        num_tokens=shape.tokens,
        num_spans=shape.spans,
        num_samples=shape.samples,
        max_query_length=shape.longest_span,
        max_context_length=max_context_length,
        **named,
    )
