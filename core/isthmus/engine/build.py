"""From settings to an engine that can take requests."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

from isthmus.cache import BlockManager
from isthmus.config import EngineOptions, require_positive
from isthmus.contract import Backend, Capabilities, ExecutorBackend, ModelFacts, StepExecutor
from isthmus.engine.core import EngineCore
from isthmus.engine.messages import EngineReady
from isthmus.errors import BackendError
from isthmus.plugins import select_backend
from isthmus.refusals import refusals
from isthmus.scheduler import Scheduler, SchedulerLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Running:
    """A model on a device, whoever loaded it."""

    executor: StepExecutor
    facts: ModelFacts


def build_engine(options: EngineOptions, progress: bool = True) -> tuple[EngineCore, EngineReady]:
    """Open the device, load the model, size the cache, and put a scheduler in front.

    Raises an :class:`isthmus.errors.IsthmusError` of one line that says what to do.
    """
    _check(options)
    selection = select_backend(options.backend.device)
    if selection.passed_over:
        logger.info("device auto passed over: %s", " | ".join(selection.passed_over))
    backend = selection.open(options.backend.options)
    try:
        running = _own_executor(backend, options) or _core_executor(cast(Backend, backend), options, progress)
    except BaseException:
        backend.close()
        raise
    depth = running.executor.max_steps_in_flight if options.scheduler.overlap else 1
    limits = _scheduler_limits(options, running.executor, backend.capabilities, depth)
    blocks = BlockManager(
        running.executor.limits.num_blocks,
        running.executor.limits.block_size,
        prefix_caching=options.cache.prefix_caching,
    )
    core = EngineCore(
        Scheduler(limits, blocks),
        running.executor,
        capabilities=backend.capabilities,
        max_steps_in_flight=depth,
        on_close=backend.close,
    )
    return core, _ready(limits, running, backend)


def _check(options: EngineOptions) -> None:
    scheduler, cache = options.scheduler, options.cache
    for name, value in (
        ("max_model_len", options.model.max_model_len),
        ("block_size", cache.block_size),
        ("num_blocks", cache.num_blocks),
        ("memory_bytes", cache.memory_bytes),
        ("memory_fraction", cache.memory_fraction),
        ("max_num_seqs", scheduler.max_num_seqs),
        ("max_num_batched_tokens", scheduler.max_num_batched_tokens),
        ("max_waiting", scheduler.max_waiting),
    ):
        require_positive(name, value)


def _own_executor(backend: Backend | ExecutorBackend, options: EngineOptions) -> _Running | None:
    """What a tier 2 or 3 backend runs by itself."""
    if not isinstance(backend, ExecutorBackend):
        return None
    made = backend.create_executor(options)
    if made is not None:
        for note in refusals(backend.capabilities):
            logger.info("%s", note)
        return _Running(*made)
    if not isinstance(backend, Backend):
        raise BackendError(
            f"backend {backend.name!r} does not run {options.model.model!r} and has no parts to run it with; "
            "name another device"
        )
    return None


def _core_executor(backend: Backend, options: EngineOptions, progress: bool) -> _Running:
    # torch is imported only where the core's own executor is used.
    from isthmus.executor import build_executor
    from isthmus.model.source import read_spec, resolve_model

    source = resolve_model(options.model.model, options.model.revision, weights=not options.model.random_weights)
    spec = read_spec(source)
    executor, report = build_executor(options, backend, source, spec, progress)
    facts = ModelFacts(
        model_name=source.name, dtype=report.dtype, eos_token_ids=spec.eos_token_ids, notes=tuple(report.notes)
    )
    return _Running(executor, facts)


def _scheduler_limits(
    options: EngineOptions, executor: StepExecutor, capabilities: Capabilities, depth: int
) -> SchedulerLimits:
    limits, asked = executor.limits, options.scheduler
    return SchedulerLimits(
        max_num_seqs=limits.max_rows,
        max_num_batched_tokens=limits.max_tokens,
        max_model_len=limits.max_model_len,
        max_waiting=asked.max_waiting,
        max_overtakes=asked.max_overtakes,
        steps_in_flight=depth,
        span_mix=capabilities.span_mix,
        max_long_spans=capabilities.max_long_spans,
    )


def _ready(limits: SchedulerLimits, running: _Running, backend: Backend | ExecutorBackend) -> EngineReady:
    sizes, facts = running.executor.limits, running.facts
    return EngineReady(
        model_name=facts.model_name,
        vocab_size=sizes.vocab_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_waiting=limits.max_waiting,
        block_size=sizes.block_size,
        num_blocks=sizes.num_blocks - 1,  # without the spare one
        eos_token_ids=facts.eos_token_ids,
        backend=backend.name,
        device_name=backend.device.name,
        dtype=facts.dtype,
        providers=backend.providers(),
        notes=facts.notes,
    )
