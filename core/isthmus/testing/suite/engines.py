"""Whole engines over the device under test, and over the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.cache import BlockManager
from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
from isthmus.contract import Backend, Capabilities, ExecutorBackend, StepExecutor
from isthmus.engine.core import EngineCore
from isthmus.engine.messages import AddRequest, EngineStats, TokensOut, pack_tokens
from isthmus.executor import ExecutorReport, build_executor
from isthmus.model.source import read_spec, resolve_model
from isthmus.sampling_params import RowSampling
from isthmus.scheduler import Scheduler, SchedulerLimits

MAX_MODEL_LEN = 192
GREEDY = RowSampling(max_tokens=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """How an engine is set up; tokens must not depend on it."""

    rows: int = 8
    tokens: int = 256
    cache_tokens: int = 4096
    """Room in the KV cache, the spare block apart."""
    prefix_caching: bool = False
    overlap: bool = True
    graphs: bool = True
    dtype: str = "float32"
    block_size: int | None = None

    def options(self, model: str, backend: Backend | ExecutorBackend) -> EngineOptions:
        block_size = self.block_size or backend.capabilities.block_sizes[0]
        return EngineOptions(
            model=ModelOptions(model=model, dtype=self.dtype, max_model_len=MAX_MODEL_LEN),
            cache=CacheOptions(
                block_size=block_size,
                num_blocks=max(-(-self.cache_tokens // block_size), -(-MAX_MODEL_LEN // block_size)),
                prefix_caching=self.prefix_caching,
            ),
            scheduler=SchedulerOptions(
                max_num_seqs=self.rows, max_num_batched_tokens=self.tokens, overlap=self.overlap
            ),
            backend=BackendOptions(device=backend.name, graphs=self.graphs),
        )


def small_blocks(capabilities: Capabilities) -> int:
    """A block size of which short prompts fill several: the largest up to 16, or the smallest there is."""
    return max((size for size in capabilities.block_sizes if size <= 16), default=min(capabilities.block_sizes))


@dataclass(slots=True)
class Outcome:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Any]] = field(default_factory=dict)

    def take(self, item: TokensOut) -> None:
        assert not item.error, item.error
        key = item.request_id
        self.tokens.setdefault(key, []).extend(item.tokens)
        self.logprobs.setdefault(key, []).extend(item.logprobs)
        self.prompt_logprobs.setdefault(key, []).extend(item.prompt_logprobs)
        if item.num_cached_tokens >= 0:
            self.cached[key] = item.num_cached_tokens


class Engine:
    """A scheduler over the backend's executor: its own, or the core's over its parts."""

    def __init__(self, backend: Backend | ExecutorBackend, model: str, how: Arrangement) -> None:
        options = how.options(model, backend)
        self.report: ExecutorReport | None = None
        self.executor = self._executor(backend, options)
        limits = self.executor.limits
        depth = self.executor.max_steps_in_flight if how.overlap else 1
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=limits.max_rows,
                max_num_batched_tokens=limits.max_tokens,
                max_model_len=limits.max_model_len,
                steps_in_flight=depth,
                span_mix=backend.capabilities.span_mix,
                max_long_spans=backend.capabilities.max_long_spans,
            ),
            BlockManager(limits.num_blocks, limits.block_size, prefix_caching=how.prefix_caching, seed=b"certify"),
        )
        self.core = EngineCore(
            self.scheduler, self.executor, capabilities=backend.capabilities, max_steps_in_flight=depth
        )

    def _executor(self, backend: Backend | ExecutorBackend, options: EngineOptions) -> StepExecutor:
        if isinstance(backend, ExecutorBackend):
            made = backend.create_executor(options)
            if made is not None:
                return made[0]
        assert isinstance(backend, Backend)
        source = resolve_model(options.model.model)
        executor, self.report = build_executor(options, backend, source, read_spec(source), progress=False)
        return executor

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: RowSampling | Callable[[int], RowSampling] = GREEDY,
        *,
        one_at_a_time: bool = False,
        abort: Callable[[int], bool] = lambda index: False,
    ) -> Outcome:
        """Every prompt's output, by its place.  ``abort`` tells which requests are ended after a few steps."""
        outcome = Outcome()
        for index, prompt in enumerate(prompts):
            parameters = sampling(index) if callable(sampling) else sampling
            self.core.add(AddRequest(request_id=index, prompt=pack_tokens(prompt), sampling=parameters))
            if one_at_a_time:
                self._drain(outcome)
        doomed = [index for index in range(len(prompts)) if abort(index)]
        if doomed:
            for _ in range(4):
                for item in self.core.step():
                    outcome.take(item)
            self.core.abort(doomed)
        self._drain(outcome)
        return outcome

    def _drain(self, outcome: Outcome) -> None:
        for _ in range(5000):
            if not self.core.has_work:
                return
            for item in self.core.step():
                outcome.take(item)
        raise AssertionError("the engine did not finish within 5000 steps")

    @property
    def stats(self) -> EngineStats:
        return self.core.stats()

    def close(self) -> None:
        """The executor alone: the device stays open."""
        self.core.close()
