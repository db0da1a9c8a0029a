"""Runs plans on a device, in terms of a backend's parts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from isthmus.contract import (
    Backend,
    CountsCompiles,
    GraphScope,
    Limits,
    PartlyCapturedSampling,
    Pending,
    Sampled,
    StepInputs,
    StepShape,
)
from isthmus.errors import BackendError, OutOfMemory, Unsupported
from isthmus.executor.capture import Capture, inputs_of
from isthmus.executor.graphs import Captured, StepGraphs
from isthmus.executor.out_of_memory import is_out_of_memory
from isthmus.executor.prompt_logprobs import PromptLogprobs, PromptPiece, joined
from isthmus.executor.shapes import Padding
from isthmus.executor.split import split
from isthmus.plan import Int32Array, StepPlan, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class StepModel(Protocol):
    """What runs between inputs and logits; see :class:`isthmus.model.decoder.Decoder`."""

    def forward(self, inputs: StepInputs, caches: Sequence[Any], wanted: Tensor | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor, index: Tensor | None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What was sampled, on its way to the host; ``count`` of its entries are no padding."""

    pending: Pending[Sequence[Any]]
    sampled: Sampled
    count: int

    def arrays(self) -> list[Any]:
        """The fields of :class:`Sampled`, waited for."""
        return [array[: self.count] for array in self.sampled.unpacked(self.pending.result())]


@dataclass(frozen=True, slots=True)
class _Fetching:
    """What a step (or a piece of one) is bringing to the host."""

    sampled: _Fetched | None
    prompts: tuple[tuple[int, _Fetched], ...]  # by row, in order


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    pending: Pending[list[_Fetching]]


class Executor:
    """:class:`isthmus.contract.StepExecutor` over a backend and a decoder.

    Not for several threads: one thread submits and collects.  A step that raises does so from its
    own :meth:`collect`, and the steps after it run.  A step that does not fit into the device's
    memory is run again in halves before it is given up.
    """

    def __init__(
        self, backend: Backend, model: StepModel, limits: Limits, caches: Sequence[Any], *, max_steps_in_flight: int = 1
    ) -> None:
        self._backend: Final = backend
        self._model: Final = model
        self._limits: Final = limits
        self._caches = caches
        self._max_steps_in_flight: Final = max_steps_in_flight
        self._padding: Final = Padding(backend.capabilities, limits)
        self._graphs = StepGraphs()
        self._device = backend.inputs.allocate(limits)
        self._sampling_state = backend.sampling.allocate(limits)
        self._num_logprobs = np.full(limits.max_rows, -1, np.int32)
        self._prompt_logprobs = PromptLogprobs()
        self._in_flight: deque[_InFlight] = deque()

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def max_steps_in_flight(self) -> int:
        return self._max_steps_in_flight

    @property
    def late_compiles(self) -> int:
        """See :class:`isthmus.contract.CountsCompiles`."""
        graphs = self._backend.graphs
        return graphs.late_compiles if isinstance(graphs, CountsCompiles) else 0

    def ready(self) -> None:
        """Start-up is over."""
        graphs = self._backend.graphs
        if isinstance(graphs, CountsCompiles):
            graphs.ready()

    @property
    def graphs(self) -> StepGraphs:
        return self._graphs

    def submit(self, plan: StepPlan) -> None:
        assert len(self._in_flight) < self._max_steps_in_flight, "collect a step before submitting another"
        assert 0 < plan.num_tokens <= self._limits.max_tokens and plan.num_spans <= self._limits.max_rows
        self._in_flight.append(_InFlight(plan, self._backend.memory.launch(lambda: self._launch(plan))))

    def collect(self) -> StepResult:
        """Raises what the step raised; :class:`OutOfMemory` if not even a single token fits."""
        assert self._in_flight, "nothing was submitted"
        flight = self._in_flight.popleft()
        return _result(flight.plan, flight.pending.result())

    def run(self, plan: StepPlan) -> StepResult:
        """Submit and collect, with nothing else in flight."""
        assert not self._in_flight
        self.submit(plan)
        return self.collect()

    def close(self) -> None:
        """Wait for what was submitted, and drop the graphs and the cache."""
        while self._in_flight:
            try:
                self.collect()
            except Exception as error:  # nobody is left to tell
                log.debug("a step in flight at the end failed: %s", error)
        self._graphs = StepGraphs()
        self._caches = ()

    def _launch(self, plan: StepPlan) -> list[_Fetching]:
        """On the thread that :meth:`Memory.launch` chose."""
        self._prompt_logprobs.start(plan)
        for start in plan.starts:
            self._num_logprobs[start.row] = start.sampling.num_logprobs
        num_logprobs = int(self._num_logprobs[plan.span_rows[plan.span_samples]].max(initial=-1))
        with torch.inference_mode():
            pieces, tokens = [plan], plan.num_tokens
            while True:
                try:
                    return [self._start(piece, num_logprobs) for piece in pieces]
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    if tokens == 1:
                        raise OutOfMemory(
                            f"the device has no memory for a single token of step {plan.step}: {error}; "
                            f"lower the cache's memory share, max_num_seqs or max_num_batched_tokens"
                        ) from error
                # Out of the except block, so that the failed attempt's tensors are gone.
                tokens = -(-tokens // 2)
                log.warning("step %d did not fit into memory; running it in pieces of %d tokens", plan.step, tokens)
                pieces = split(plan, tokens)

    def _start(self, plan: StepPlan, num_logprobs: int) -> _Fetching:
        backend, device, state = self._backend, self._device, self._sampling_state
        backend.inputs.upload(plan, device)
        backend.sampling.apply(state, plan)
        prompt_pieces = self._prompt_logprobs.pieces(plan)
        shape = self._padding.shape(plan)
        captured = self._graph_for(plan, shape, num_logprobs, bool(prompt_pieces))
        if captured is not None and self._graphs.scope is GraphScope.STEP:
            sampled = captured.graph.replay(plan.num_tokens)
            return self._fetching(sampled, plan) if plan.span_samples.any() else _Fetching(None, ())

        inputs, hidden, logits = self._forward(shape, captured, keep_hidden=bool(prompt_pieces))
        prompts = tuple((piece.row, self._fetch_prompt(hidden, piece)) for piece in prompt_pieces)
        if not plan.span_samples.any():
            return _Fetching(None, prompts)
        if logits is None:
            logits = self._model.logits(hidden, inputs.sample_tokens)
        return self._fetching(backend.sampling.sample(logits, inputs, device, state, num_logprobs), plan, prompts)

    def _forward(
        self, shape: StepShape, captured: Captured | None, *, keep_hidden: bool
    ) -> tuple[StepInputs, Any, Tensor | None]:
        """Inputs, hidden states, and the logits of the sampled tokens where nothing needs the hidden states."""
        build = self._backend.inputs.build
        if captured is None:
            inputs = build(self._device, shape)
            if keep_hidden or shape.samples == shape.tokens:
                return inputs, self._model.forward(inputs, self._caches), None
            # Nothing reads the other tokens after the last layer's attention.
            wanted = inputs.sample_tokens if shape.samples else inputs.query_starts[:1]
            hidden = self._model.forward(inputs, self._caches, wanted)
            return inputs, None, self._model.logits(hidden, None) if shape.samples else None
        if self._graphs.any_shape:
            inputs = build(self._device, captured.shape._replace(samples=shape.samples))
            return inputs, captured.graph.replay(shape.tokens)[: shape.tokens], None
        logits, *tensors = captured.graph.replay(shape.tokens)
        inputs = inputs_of(tensors, self._device, captured.shape, self._limits.max_model_len)
        if self._padding.bucketed:
            return inputs, None, logits
        return narrowed(inputs, shape.samples), None, logits[: shape.samples]

    def _graph_for(self, plan: StepPlan, shape: StepShape, num_logprobs: int, prompt_logprobs: bool) -> Captured | None:
        if prompt_logprobs and not self._graphs.any_shape:
            return None  # only eager steps keep the hidden states
        if self._graphs.scope is GraphScope.STEP and num_logprobs >= 0:
            return None  # captured without log-probabilities
        if self._graphs.scope is GraphScope.STEP and not self._replayable():
            return None
        return self._graphs.find(shape, all_sampled=bool(plan.span_samples.all()))

    def _replayable(self) -> bool:
        sampling = self._backend.sampling
        return not isinstance(sampling, PartlyCapturedSampling) or sampling.replayable(self._sampling_state)

    def _fetching(self, sampled: Sampled, plan: StepPlan, prompts: tuple[tuple[int, _Fetched], ...] = ()) -> _Fetching:
        return _Fetching(self._fetch(sampled, int(plan.span_samples.sum())), prompts)

    def _fetch(self, sampled: Sampled, count: int) -> _Fetched:
        return _Fetched(self._backend.memory.fetch(sampled.tensors()), sampled, count)

    def _fetch_prompt(self, hidden: Tensor, piece: PromptPiece) -> _Fetched:
        where = self._backend.memory.device
        count = len(piece.next_tokens)
        index = torch.arange(piece.begin, piece.begin + count, dtype=torch.int32, device=where)
        following = torch.from_numpy(piece.next_tokens).to(where)
        logits = self._model.logits(hidden, index)
        return self._fetch(self._backend.sampling.prompt_logprobs(logits, following, piece.num_logprobs), count)

    # Start-up

    def warm_up(self, plans: Iterable[StepPlan]) -> None:
        """Run these, so that no request pays for a first time."""
        for plan in plans:
            self.run(plan)

    def capture(self, *, progress: bool = False, largest_only: bool = False) -> tuple[str, ...]:
        """Capture what the backend's capabilities allow, or of the bucketed shapes just the largest.

        Returns what could not be captured and why; such steps run eagerly or padded.
        """
        if self._backend.capabilities.graph_scope is GraphScope.NONE:
            return ()
        capture = Capture(
            backend=self._backend,
            model=self._model,
            limits=self._limits,
            padding=self._padding,
            device=self._device,
            sampling_state=self._sampling_state,
            caches=self._caches,
        )

        def run() -> StepGraphs:
            with torch.inference_mode():
                shapes = self._padding.shapes()
                return capture.of([max(shapes)] if largest_only else shapes, progress=progress)

        try:
            self._graphs = self._backend.memory.launch(run).result()
        except Unsupported as error:
            return (f"steps run eagerly: {error}",)
        return self._graphs.notes


def narrowed(inputs: StepInputs, samples: int) -> StepInputs:
    """Without the padded samples."""
    return replace(
        inputs,
        num_samples=samples,
        sample_tokens=inputs.sample_tokens[:samples],
        sample_rows=inputs.sample_rows[:samples],
    )


def _result(plan: StepPlan, pieces: list[_Fetching]) -> StepResult:
    fetched = [piece.sampled.arrays() for piece in pieces if piece.sampled is not None]
    rows: Int32Array = plan.span_rows[plan.span_samples]
    prompts: dict[int, list[TokenLogprobs]] = {}
    for piece in pieces:
        for row, fetching in piece.prompts:
            prompts.setdefault(row, []).append(_logprobs(fetching.arrays()))
    if not fetched:
        tokens, invalid, logprobs = np.zeros(0, np.int32), np.zeros(0, np.bool_), None
    else:
        tokens = np.concatenate([arrays[0] for arrays in fetched])
        invalid = np.concatenate([arrays[1] for arrays in fetched])
        logprobs = joined([_logprobs(arrays) for arrays in fetched]) if len(fetched[0]) > 2 else None
    if tokens.shape != rows.shape or invalid.shape != rows.shape:
        raise BackendError(
            f"the backend sampled tokens of shape {tokens.shape}, of which {invalid.shape} may be invalid, "
            f"for {len(rows)} rows; report it to its vendor"
        )
    return StepResult(
        step=plan.step,
        rows=rows,
        tokens=tokens[:, None],
        invalid=invalid,
        logprobs=logprobs,
        prompt_logprobs={row: joined(parts) for row, parts in prompts.items()},
    )


def _logprobs(arrays: Sequence[Any]) -> TokenLogprobs:
    _, _, chosen, ranks, top_ids, top_logprobs = arrays
    return TokenLogprobs(chosen=chosen, ranks=ranks, top_ids=top_ids, top_logprobs=top_logprobs)
