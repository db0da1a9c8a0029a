"""From options to an executor that is loaded, sized, warm and captured."""

from __future__ import annotations

import gc
import logging
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.config import EngineOptions
from isthmus.contract import Backend, Capabilities, GraphScope, Limits, ShapePolicy, SpanMix
from isthmus.errors import OutOfMemory
from isthmus.executor.blame import blamed
from isthmus.executor.downgrades import downgrades
from isthmus.executor.dummy import dummy_plan, largest_plan
from isthmus.executor.executor import Executor, StepModel
from isthmus.executor.out_of_memory import is_out_of_memory
from isthmus.executor.report import ExecutorReport
from isthmus.executor.sizing import (
    CacheSize,
    bytes_per_block,
    check_features,
    choose_block_size,
    choose_dtype,
    choose_kv_dtype,
    choose_max_model_len,
    choose_step_limits,
    device_budget,
    enough_blocks,
    size_cache,
    unified_budget,
)
from isthmus.model.spec import ModelSpec
from isthmus.plan import StepPlan
from isthmus.sampling_params import RowSampling

if TYPE_CHECKING:
    from isthmus.model.source import ModelSource

log = logging.getLogger(__name__)


def build_executor(
    options: EngineOptions, backend: Backend, source: ModelSource, spec: ModelSpec, progress: bool
) -> tuple[Executor, ExecutorReport]:
    """Load the model onto the backend and make it ready to serve.

    ``progress`` draws a bar while weights load and while many shapes compile.  Raises an
    :class:`isthmus.errors.IsthmusError` of one line where something asked for is not to be had; the
    backend is left open.
    """
    capabilities = backend.capabilities
    dtype = choose_dtype(options.model.dtype, spec.dtype, capabilities, backend.name)
    report = ExecutorReport(
        dtype=dtype, kv_dtype=choose_kv_dtype(options.cache.kv_dtype, dtype, capabilities, backend.name)
    )
    limits = _limits(options, backend, spec, report)

    gauge = _Gauge(backend)
    began = time.perf_counter()
    model = _load(options, backend, source, spec, dtype, limits.max_model_len, progress)
    report.load_s = time.perf_counter() - began
    report.weights_bytes = gauge.taken()
    return _Build(options, backend, spec, model, limits, report, gauge, source.kind == "gguf", progress).finish()


def _limits(options: EngineOptions, backend: Backend, spec: ModelSpec, report: ExecutorReport) -> Limits:
    """All sizes but the cache's, for which a single block beside the spare one stands in."""
    max_model_len = choose_max_model_len(options.model, spec)
    check_features(spec, backend.capabilities, max_model_len, backend.name)
    step = choose_step_limits(options.scheduler, backend.capabilities)
    report.notes += step.notes
    return Limits(
        max_rows=step.max_rows,
        max_tokens=step.max_tokens,
        max_model_len=max_model_len,
        block_size=choose_block_size(options.cache.block_size, backend.capabilities, backend.name),
        num_blocks=2,
        vocab_size=spec.vocab_size,
    )


def _load(
    options: EngineOptions,
    backend: Backend,
    source: ModelSource,
    spec: ModelSpec,
    dtype: str,
    max_positions: int,
    progress: bool,
) -> StepModel:
    from isthmus.model.weights import load_decoder

    try:
        return load_decoder(
            source,
            spec,
            backend,
            dtype,
            max_positions,
            random_weights=options.model.random_weights,
            progress=progress,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        total = backend.memory.total_bytes() / 2**30
        raise OutOfMemory(
            f"the weights of {source.name} in {dtype} do not fit into the {total:.1f} GiB of {backend.device.name}; "
            f"take a smaller model, a smaller dtype or a larger device"
        ) from error


@dataclass(slots=True)
class _Build:
    """The steps after loading."""

    options: EngineOptions
    backend: Backend
    spec: ModelSpec
    model: StepModel
    limits: Limits
    report: ExecutorReport
    gauge: _Gauge
    packed: bool
    """Whether the file's weights are in a block format."""
    progress: bool

    def finish(self) -> tuple[Executor, ExecutorReport]:
        size = self._size_cache()
        self.report.notes += size.notes
        # The rows' buffers are made again for the length that fits.
        self.limits = replace(self.limits, max_model_len=size.max_model_len, num_blocks=size.num_blocks + 1)
        executor = self._executor(self.limits)
        self.report.kv_bytes = self.limits.num_blocks * self._block_bytes
        self.gauge.taken()

        # Where every step has a graph, nothing is to run without one: not even the first steps.
        stages = [self._warm_up, self._capture]
        for stage in reversed(stages) if self._all_captured else stages:
            stage(executor)
        executor.ready()
        self.report.providers = self.backend.providers()
        log.info("%s", self.report.summary())
        for note in [*self._downgrades(), *self.report.notes]:
            log.info("%s", note)
        return executor, self.report

    @property
    def _all_captured(self) -> bool:
        capabilities = self.backend.capabilities
        bucketed = capabilities.shapes is ShapePolicy.BUCKETED and capabilities.graph_scope is not GraphScope.NONE
        return bucketed and self.options.backend.graphs

    def _warm_up(self, executor: Executor) -> None:
        began = time.perf_counter()
        with blamed(self.backend, "running its first steps"):
            executor.warm_up(warm_up_plans(self.backend.capabilities, self.limits))
        self.report.warm_up_s += time.perf_counter() - began

    def _downgrades(self) -> list[str]:
        return downgrades(
            self.options,
            self.backend.capabilities,
            self.spec,
            dtype=self.report.dtype,
            kv_dtype=self.report.kv_dtype,
            packed=self.packed,
        )

    @property
    def _block_bytes(self) -> int:
        return bytes_per_block(self.spec, self.backend.attention, self.limits.block_size, self.report.kv_dtype)

    def _executor(self, limits: Limits) -> Executor:
        layers = [layer.attention for layer in self.spec.layers]
        with blamed(self.backend, "allocating the KV cache"):
            caches = self.backend.attention.allocate(layers, limits, self.report.kv_dtype)
            if not isinstance(caches, Sequence) or len(caches) != len(layers):
                count = len(caches) if isinstance(caches, Sequence) else type(caches).__name__
                raise ValueError(f"attention.allocate returned {count} for the caches of {len(layers)} layers")
        in_flight = self.backend.capabilities.max_steps_in_flight if self.options.scheduler.overlap else 1
        return Executor(self.backend, self.model, limits, caches, max_steps_in_flight=in_flight)

    def _size_cache(self) -> CacheSize:
        limits, cache, memory = self.limits, self.options.cache, self.backend.memory
        if self.backend.capabilities.unified_memory:
            enough = enough_blocks(limits.max_rows, limits.max_model_len, limits.block_size) * self._block_bytes
            budget = unified_budget(cache, memory.available_bytes(), enough)
        else:
            self._measure_largest_step()
            budget = device_budget(cache, memory.total_bytes(), memory.available_bytes())
        return size_cache(
            cache,
            budget,
            self._block_bytes,
            limits.block_size,
            limits.max_model_len,
            asked=self.options.model.max_model_len is not None,
        )

    def _measure_largest_step(self) -> None:
        """Run it once over a cache of two blocks: what the allocator then holds stays its workspace."""
        began = time.perf_counter()
        executor = self._executor(self.limits)
        with blamed(self.backend, "running its largest step"):
            if self._all_captured:
                executor.capture(largest_only=True)
            executor.run(largest_plan(self.limits, self.backend.capabilities))
        self.backend.memory.synchronize()
        executor.close()
        del executor
        gc.collect()
        self.report.warm_up_s += time.perf_counter() - began
        self.report.workspace_bytes = self.gauge.taken()

    def _capture(self, executor: Executor) -> None:
        if not self.options.backend.graphs:
            self.report.notes.append("steps run eagerly: graphs are switched off")
            return
        self.gauge.taken()
        with blamed(self.backend, "capturing graphs"):
            self.report.notes += executor.capture(progress=self.progress)
        self.report.graph_bytes = self.gauge.taken()
        self.report.capture_s = executor.graphs.capture_s
        self.report.num_graphs = len(executor.graphs.captured)


def warm_up_plans(capabilities: Capabilities, limits: Limits) -> list[StepPlan]:
    """Short steps, greedy and drawn; where steps are padded to buckets, each number of rows and of tokens."""
    drawn = RowSampling(max_tokens=1, temperature=1.0, top_p=0.9, seed=1)
    longest = min(limits.max_tokens, limits.max_model_len)
    rows = min(limits.max_tokens, limits.max_rows)
    if capabilities.shapes is ShapePolicy.BUCKETED:
        sizes = sorted({size for size in capabilities.span_buckets if size < rows} | {rows})
        singles = [dummy_plan([1] * size, parameters) for size in sizes for parameters in (None, drawn)]
        lengths = sorted({size for size in capabilities.token_buckets if size < longest} | {longest})
        return [*singles, *(dummy_plan([length], parameters) for length in lengths for parameters in (None, drawn))]
    plans = [[1], [min(16, longest)], [1] * min(rows, 8)]
    if rows > 1 and longest > 16 and capabilities.span_mix is SpanMix.ANY:
        plans.append([1, 16])
    return [*map(dummy_plan, plans), dummy_plan([1], drawn)]


class _Gauge:
    """Memory taken between one call of :meth:`taken` and the next."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._last = self._used()

    def taken(self) -> int:
        before, self._last = self._last, self._used()
        return max(0, self._last - before)

    def _used(self) -> int:
        if self._backend.capabilities.unified_memory:
            return resident_bytes()
        memory = self._backend.memory
        return memory.total_bytes() - memory.available_bytes()


def resident_bytes() -> int:
    """This process's resident memory, or its peak where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
