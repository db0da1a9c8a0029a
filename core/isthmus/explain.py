"""What a model would get on a device, without loading its weights: ``isthmus explain``.

The device is opened, since only it knows its memory and its cache's layout; the model's config is
read.  Every choice is made by the functions that make it at start-up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from isthmus.config import EngineOptions
from isthmus.contract import Backend, ExecutorBackend, GraphScope, Limits, ShapePolicy, StepShape
from isthmus.errors import OutOfMemory
from isthmus.plugins import Selection, select_backend
from isthmus.refusals import refusals

if TYPE_CHECKING:
    from isthmus.executor.shapes import Padding
    from isthmus.executor.sizing import StepLimits
    from isthmus.model.source import ModelSource
    from isthmus.model.spec import ModelSpec

DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
GIB: Final = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Bytes.  ``weights`` and ``kv`` are counted; ``workspace`` and ``graphs`` are estimates, which
    start-up replaces by measuring."""

    total: int
    available: int
    weights: int
    workspace: int
    graphs: int
    kv: int
    kv_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    model: str
    architecture: str = ""
    num_parameters: int = 0
    backend: str
    device: str
    runs: str
    """Whose executor runs the steps."""
    dtype: str = ""
    kv_dtype: str = ""
    block_size: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    ledger: Ledger | None = None
    kv_tokens: int = 0
    """Tokens that the cache holds."""
    request_tokens: int = 0
    requests: int = 0
    """Requests of ``request_tokens`` that it holds at once."""
    graph_scope: str = "none"
    graph_sizes: tuple[int, ...] = ()
    """Tokens of the steps that are captured; where there are ``mixed_graph_sizes``, of those that decode."""
    mixed_graph_sizes: tuple[int, ...] = ()
    """Tokens of captured steps of spans of any lengths, where decode steps have graphs of their own."""
    token_buckets: tuple[int, ...] = ()
    span_buckets: tuple[int, ...] = ()
    block_buckets: tuple[int, ...] = ()
    """KV blocks that a step's attention is padded to; see ``Capabilities.blocks_counted``."""
    num_graphs: int = 0
    """One for each size, or for each combination of buckets that a step can have."""
    steps_in_flight: int = 1
    providers: dict[str, str]
    downgrades: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    problem: str = ""
    """Why it could not be served as asked; empty if it can."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def text(self) -> str:
        lines = [f"{self.model} on {self.backend} ({self.device})", f"  {self.runs}"]
        if self.architecture:
            lines.append(f"  {self.architecture}, {self.num_parameters / 1e6:,.0f} million parameters, {self.dtype}")
        if self.ledger is not None:
            lines += ["", *self._memory(self.ledger)]
        lines += ["", "steps", *_indented(self._steps())]
        lines += ["", "providers", *_indented(f"{part}: {who}" for part, who in self.providers.items())]
        for title, notes in (("downgrades", self.downgrades), ("passed over", self.passed_over)):
            if notes:
                lines += ["", title, *_indented(notes)]
        if self.problem:
            lines += ["", f"cannot be served so: {self.problem}"]
        return "\n".join(lines)

    def _memory(self, ledger: Ledger) -> list[str]:
        entries = [
            ("weights", ledger.weights, self.dtype),
            ("workspace", ledger.workspace, f"estimate, {self.max_num_batched_tokens} tokens a step"),
            ("graphs", ledger.graphs, f"estimate, {self.num_graphs} of them" if self.num_graphs else "none"),
            ("KV cache", ledger.kv, f"{self.kv_dtype}, {ledger.kv_per_token / 1024:.1f} KiB a token"),
        ]
        lines = [f"memory, of {ledger.available / GIB:.2f} GiB available ({ledger.total / GIB:.2f} GiB in all)"]
        lines += [f"  {name:<10}{size / GIB:>9.3f} GiB  {what}" for name, size, what in entries]
        lines.append(
            f"  the cache holds {self.kv_tokens:,} tokens: {self.requests:,} requests of {self.request_tokens:,}"
            f" (at most {self.max_num_seqs} run at once, of at most {self.max_model_len:,} tokens)"
        )
        return lines

    def _steps(self) -> list[str]:
        lines = [f"{self.steps_in_flight} in flight"]
        if self.block_size:
            lines.append(f"KV blocks of {self.block_size} tokens")
        if self.token_buckets or self.span_buckets:
            lines.append(f"padded to {_listed(self.token_buckets)} tokens and {_listed(self.span_buckets)} rows")
            if self.block_buckets:
                lines.append(f"attention padded to {_listed(self.block_buckets)} KV blocks")
        else:
            lines.append("any number of tokens and rows, unpadded")
        if self.graph_sizes:
            sizes = f"graphs of {self.graph_scope} captured for {_listed(self.graph_sizes)} tokens"
            bucketed = f", {self.num_graphs} shapes in all" if self.token_buckets else ""
            lines.append(sizes + bucketed)
        if self.mixed_graph_sizes:
            lines.append(f"and for steps that hold prompts of up to {_listed(self.mixed_graph_sizes)} tokens")
        return lines


def explain(options: EngineOptions, request_tokens: int | None = None) -> Explanation:
    """Open the device, look, and close it again.

    ``request_tokens`` is the length (prompt and output) of the requests that are counted; the
    longest that fits if it is ``None``.  Raises an :class:`isthmus.errors.IsthmusError` for a device
    or a model that cannot be used, as start-up would.
    """
    selection = select_backend(options.backend.device)
    backend = selection.open(options.backend.options)
    try:
        if not isinstance(backend, Backend):
            return _own_executor(options, backend, selection)
        return _Look(options, backend, selection.passed_over, request_tokens).explanation()
    finally:
        backend.close()


def _own_executor(options: EngineOptions, backend: ExecutorBackend, selection: Selection) -> Explanation:
    c = backend.capabilities
    return Explanation(
        model=options.model.model,
        backend=backend.name,
        device=backend.device.name,
        runs="the backend loads the model and runs whole steps by itself; its memory shows once it has",
        block_size=options.cache.block_size or c.block_sizes[0],
        graph_scope=c.graph_scope,
        token_buckets=c.token_buckets,
        span_buckets=c.span_buckets,
        block_buckets=c.block_buckets,
        steps_in_flight=c.max_steps_in_flight if options.scheduler.overlap else 1,
        providers=backend.providers(),
        downgrades=tuple(refusals(c)),
        passed_over=selection.passed_over,
    )


class _Look:
    """A backend with parts: everything that start-up would settle, in its order."""

    def __init__(
        self, options: EngineOptions, backend: Backend, passed_over: tuple[str, ...], request_tokens: int | None
    ) -> None:
        from isthmus.executor.sizing import (
            bytes_per_block,
            check_features,
            choose_block_size,
            choose_dtype,
            choose_kv_dtype,
            choose_max_model_len,
            choose_step_limits,
        )
        from isthmus.model.source import read_spec, resolve_model

        self.options, self.backend, self.passed_over = options, backend, passed_over
        self.asked_tokens = request_tokens
        capabilities, name = backend.capabilities, backend.name
        self.source: ModelSource = resolve_model(options.model.model, options.model.revision, weights=False)
        self.spec: ModelSpec = read_spec(self.source)
        self.dtype = choose_dtype(options.model.dtype, self.spec.dtype, capabilities, name)
        self.kv_dtype = choose_kv_dtype(options.cache.kv_dtype, self.dtype, capabilities, name)
        self.max_model_len = choose_max_model_len(options.model, self.spec)
        check_features(self.spec, capabilities, self.max_model_len, name)
        self.step: StepLimits = choose_step_limits(options.scheduler, capabilities)
        self.block_size = choose_block_size(options.cache.block_size, capabilities, name)
        self.block_bytes = bytes_per_block(self.spec, backend.attention, self.block_size, self.kv_dtype)
        self.num_parameters = self._count_parameters()

    def explanation(self) -> Explanation:
        from isthmus.executor.downgrades import downgrades

        options, capabilities = self.options, self.backend.capabilities
        num_blocks, max_model_len, sizing, problem = self._cache()
        tokens = num_blocks * self.block_size
        request = min(self.asked_tokens or max_model_len, max_model_len)
        notes = downgrades(
            options,
            capabilities,
            self.spec,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            packed=self.source.kind == "gguf",
        )
        if self.asked_tokens and self.asked_tokens > max_model_len:
            sizing += (f"requests are counted at {max_model_len} tokens, the longest that fits",)
        captured = self._captured(max_model_len, num_blocks)
        bucketed = capabilities.shapes is ShapePolicy.BUCKETED
        decode = [] if bucketed else [shape for shape in captured if shape.single]
        shapes = self._padding(max_model_len, num_blocks).shapes() if bucketed else []
        return Explanation(
            model=options.model.model,
            architecture=self.spec.architecture,
            num_parameters=self.num_parameters,
            backend=self.backend.name,
            device=self.backend.device.name,
            runs="the core's executor runs steps over the backend's parts",
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            max_model_len=max_model_len,
            max_num_seqs=self.step.max_rows,
            max_num_batched_tokens=self.step.max_tokens,
            ledger=self._ledger(num_blocks),
            kv_tokens=tokens,
            request_tokens=request,
            requests=num_blocks // -(-request // self.block_size) if request else 0,
            graph_scope=capabilities.graph_scope,
            graph_sizes=_tokens(decode or captured),
            mixed_graph_sizes=_tokens(set(captured) - set(decode)) if decode else (),
            num_graphs=len(captured),
            token_buckets=_tokens(shapes),
            span_buckets=tuple(sorted({shape.spans for shape in shapes})),
            block_buckets=tuple(sorted({shape.blocks for shape in shapes} - {0})),
            steps_in_flight=capabilities.max_steps_in_flight if options.scheduler.overlap else 1,
            providers=self.backend.providers(),
            downgrades=(*self.step.notes, *sizing, *notes),
            passed_over=self.passed_over,
            problem=problem,
        )

    def _count_parameters(self) -> int:
        from isthmus.model import config, gguf_config
        from isthmus.model.layout import layout_of

        architecture = self.spec.architecture
        own = self.source.kind == "safetensors"
        names = config.ARCHITECTURES[architecture].names if own else gguf_config.names_of(architecture)
        return sum(math.prod(part.shape) for part in layout_of(self.spec, names, ()).parts())

    def _cache(self) -> tuple[int, int, tuple[str, ...], str]:
        """Blocks, the longest sequence, notes, and why it does not fit."""
        from isthmus.executor.sizing import device_budget, enough_blocks, size_cache, unified_budget

        cache, memory = self.options.cache, self.backend.memory
        left = memory.available_bytes() - self._weights() - self._workspace(self.step.max_tokens) - self._graphs()
        if self.backend.capabilities.unified_memory:
            enough = enough_blocks(self.step.max_rows, self.max_model_len, self.block_size) * self.block_bytes
            budget = unified_budget(cache, max(left, 0), enough)
        else:
            budget = device_budget(cache, memory.total_bytes(), left)
        asked = self.options.model.max_model_len is not None
        try:
            size = size_cache(cache, budget, self.block_bytes, self.block_size, self.max_model_len, asked=asked)
        except OutOfMemory as error:
            num_blocks = cache.num_blocks or max(budget // self.block_bytes - 1, 0)
            return num_blocks, min(self.max_model_len, num_blocks * self.block_size), (), str(error)
        return size.num_blocks, size.max_model_len, size.notes, ""

    def _ledger(self, num_blocks: int) -> Ledger:
        memory = self.backend.memory
        return Ledger(
            total=memory.total_bytes(),
            available=memory.available_bytes(),
            weights=self._weights(),
            workspace=self._workspace(self.step.max_tokens),
            graphs=self._graphs(),
            kv=(num_blocks + 1) * self.block_bytes,
            kv_per_token=self.block_bytes // self.block_size,
        )

    def _weights(self) -> int:
        return self.num_parameters * DTYPE_BYTES[self.dtype]

    def _workspace(self, tokens: int) -> int:
        """Rows' histories and tables, and the widest tensors of a step that are alive together."""
        spec, rows = self.spec, self.step.max_rows
        state = (rows + 1) * (self.max_model_len + 1 + -(-self.max_model_len // self.block_size)) * 4
        heads = max((layer.attention.heads + 2 * layer.attention.kv_heads) * layer.attention.head_dim
                    for layer in spec.layers)  # fmt: skip
        widest = 3 * spec.hidden + max(heads, 3 * spec.inner)
        return state + tokens * widest * DTYPE_BYTES[self.dtype] + min(rows, tokens) * spec.vocab_size * 4

    def _graphs(self) -> int:
        """One pool, as large as the largest graph needs it."""
        shapes = self._captured(self.max_model_len, 1)
        return self._workspace(max(shapes).tokens) if shapes else 0

    def _captured(self, max_model_len: int, num_blocks: int) -> list[StepShape]:
        if self.backend.capabilities.graph_scope is GraphScope.NONE or not self.options.backend.graphs:
            return []
        return self._padding(max_model_len, num_blocks).shapes()

    def _padding(self, max_model_len: int, num_blocks: int) -> Padding:
        from isthmus.executor.shapes import Padding

        limits = Limits(
            max_rows=self.step.max_rows,
            max_tokens=self.step.max_tokens,
            max_model_len=max(max_model_len, 1),
            block_size=self.block_size,
            num_blocks=num_blocks + 1,
            vocab_size=self.spec.vocab_size,
        )
        return Padding(self.backend.capabilities, limits)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _tokens(shapes: Iterable[StepShape]) -> tuple[int, ...]:
    return tuple(sorted({shape.tokens for shape in shapes}))


def _listed(sizes: Sequence[int]) -> str:
    if len(sizes) <= 8:
        return ", ".join(map(str, sizes))
    return f"{', '.join(map(str, sizes[:4]))} ... {sizes[-1]} ({len(sizes)} sizes)"
