"""The parts a backend is made of.  Each has a plain-torch reference in ``isthmus.reference``.

Shapes: ``tokens`` is a step's tokens, ``spans`` its spans, ``heads`` query heads, ``kv_heads`` key
heads.  Unless a method says otherwise it neither synchronises with the host nor changes its
arguments.  ``hidden`` tensors have the backend's compute dtype; nothing above the backend assumes
which one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from isthmus.contract.capabilities import Capabilities, DeviceInfo
from isthmus.contract.inputs import DeviceState, Limits, Sampled, StepInputs, StepShape
from isthmus.plan import StepPlan, StepResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's attention.  ``window`` counts keys a query sees, itself included; 0 is all."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    """Scores become ``softcap * tanh(scores / softcap)``; 0 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """How a layer's queries and keys are rotated, half-split ("neox") order.

    ``cos_sin`` holds cosines then sines; ``rotary_dim`` leading dimensions of a head are rotated.
    """

    cos_sin: Tensor  # float32 [max_positions, rotary_dim]
    rotary_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QkNorm:
    """RMS norm of each query and key head before rotation (Qwen3, Gemma 3)."""

    query_weight: Tensor  # float32 [head_dim]
    key_weight: Tensor  # float32 [head_dim]
    epsilon: float


class Attention(Protocol):
    """The KV cache's layout, and everything that reads or writes it."""

    def block_bytes(self, layer: AttentionSpec, block_size: int, kv_dtype: str) -> int:
        """Bytes that one block takes in one layer, keys and values together."""
        ...

    def allocate(self, layers: Sequence[AttentionSpec], limits: Limits, kv_dtype: str) -> Sequence[Any]:
        """The cache of each layer, zeroed, in a layout that only this backend knows.

        Raises :class:`isthmus.errors.OutOfMemory`.
        """
        ...

    def plan(self, inputs: StepInputs) -> Any:
        """Work shared by all layers of a step, such as splitting long contexts over the device."""
        ...

    def rotate_and_store(
        self,
        qkv: Tensor,  # [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys, values
        cache: Any,
        layer: AttentionSpec,
        rotary: RotarySpec,
        qk_norm: QkNorm | None,
        inputs: StepInputs,
    ) -> Tensor:
        """Norm (where given) and rotate queries and keys, write keys and values to ``inputs.slots``.

        Returns the queries, [tokens, heads, head_dim].
        """
        ...

    def attend(self, query: Tensor, cache: Any, layer: AttentionSpec, plan: Any, inputs: StepInputs) -> Tensor:
        """Causal attention of each span over its row's blocks; [tokens, heads * head_dim].

        The query at position ``p`` sees keys at positions ``max(0, p - window + 1) ... p``.
        """
        ...


class LinearWeight(Protocol):
    """A weight prepared for :meth:`Ops.linear`, in whatever layout the backend likes."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...


class Ops(Protocol):
    """The arithmetic of a layer.  Override any."""

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """Take over ``weight`` [out, in] (and ``bias`` [out]); called once a weight, at load.

        The caller drops its reference, so that there is no second copy afterwards.
        """
        ...

    def prepare_embedding(self, weight: Tensor) -> tuple[Any, LinearWeight]:
        """An embedding table [vocab, hidden] that also serves as the output projection (tied)."""
        ...

    def prepare_table(self, weight: Tensor) -> Any:
        """An embedding table [vocab, hidden] that only :meth:`embed` reads."""
        ...

    def prepare_norm(self, weight: Tensor) -> Tensor:
        """A norm's weight [hidden] on the device, float32."""
        ...

    def embed(self, token_ids: Tensor, table: Any, scale: float) -> Tensor:
        """Rows of the table times ``scale``: hidden [tokens, hidden]."""
        ...

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """``x @ weight.T + bias``: [tokens, in] to [tokens, out]."""
        ...

    def logits(self, hidden: Tensor, weight: LinearWeight, softcap: float) -> Tensor:
        """float32 logits [samples, vocab] of already gathered and normed rows."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension, computed in float32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """``residual + x`` normed, and the sum itself.  May overwrite both arguments."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + x``.  May overwrite both arguments."""
        ...

    def gated_activation(self, gate_up: Tensor, activation: str) -> Tensor:
        """``act(gate) * up`` from [tokens, 2 * inner]; ``activation`` is "silu" or "gelu_tanh".  May overwrite
        its argument, and return a view of it whose rows lie apart."""
        ...

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """``x[index]`` for an int32 index [samples]."""
        ...

    def prepare_experts(self, gate_up: Tensor, down: Tensor) -> Any:
        """Expert weights: ``gate_up`` [experts, 2 * inner, hidden], ``down`` [experts, hidden, inner]."""
        ...

    def experts(
        self, x: Tensor, router_logits: Tensor, weights: Any, *, top_k: int, renormalize: bool, activation: str
    ) -> Tensor:
        """Mixture of experts: softmax over ``router_logits`` [tokens, experts], the ``top_k`` of
        each token weighted by their probabilities (summing to 1 if ``renormalize``)."""
        ...


class Sampling(Protocol):
    """Logits to tokens.  Parameters are per row; a row's draw depends on its own seed and position only."""

    def allocate(self, limits: Limits) -> Any:
        """Per-row sampling state, at neutral values."""
        ...

    def apply(self, state: Any, plan: StepPlan) -> None:
        """Take over the parameters of ``plan.starts`` before the step runs."""
        ...

    def sample(self, logits: Tensor, inputs: StepInputs, device: DeviceState, state: Any, num_logprobs: int) -> Sampled:
        """Sample each of ``inputs.sample_rows``, write the tokens into ``device.tokens`` at the
        position after the span, and return them.  ``num_logprobs`` is -1 for none, else the
        largest number of top tokens that a sampled row asked for.  Never fails for a bad row: it
        sets ``invalid`` there.  May overwrite ``logits``.
        """
        ...

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, num_logprobs: int) -> Sampled:
        """Log-probabilities of given tokens, int32 [positions], under ``logits`` [positions, vocab]."""
        ...


@runtime_checkable
class PartlyCapturedSampling(Protocol):
    """What a :class:`Sampling` may add if a captured step cannot serve every row's parameters.

    Without it, a step captured with ``num_logprobs`` -1 is taken to serve every such step.
    """

    def replayable(self, state: Any) -> bool:
        """Whether the sampling of the plan last applied may come from a captured step.  Host work only."""
        ...


class Inputs(Protocol):
    """Brings a plan to the device and turns it into :class:`StepInputs`."""

    def allocate(self, limits: Limits) -> DeviceState:
        """State of all rows, and (inside this object) the buffers of a step's inputs."""
        ...

    def upload(self, plan: StepPlan, device: DeviceState) -> None:
        """Apply the plan's row starts and block appends, and bring up its spans, in one copy
        where the device is apart from the host.  ``plan``'s arrays are not kept."""
        ...

    def build(self, device: DeviceState, shape: StepShape) -> StepInputs:
        """Inputs of the plan last uploaded, padded up to ``shape``.  Device work only where the
        backend captures it; reads ``device.tokens`` at the time it runs, not at the time it is called."""
        ...


class CapturedGraph(Protocol[T_co]):
    def replay(self, num_tokens: int) -> T_co:
        """Run what was captured again, and return its output: the same buffers each time, or new ones.

        ``num_tokens`` is at most the captured number, and matters only with ``graph_any_size``.
        """
        ...


class Graphs(Protocol):
    def capture(self, step: Callable[[], T], num_tokens: int) -> CapturedGraph[T]:
        """Record ``step``, whose inputs are of ``num_tokens``.  It may be called once or more, and what
        it then returns is of no use: only a replay's output is.

        Raises :class:`isthmus.errors.Unsupported` if the step cannot be captured; the caller then
        runs it eagerly.
        """
        ...


@runtime_checkable
class CountsCompiles(Protocol):
    """What a :class:`Graphs`, or an executor of its own, adds where a shape that was not captured would have to
    be compiled first."""

    @property
    def late_compiles(self) -> int:
        """Programs compiled since :meth:`ready`: each kept requests waiting, and is a fault of the buckets."""
        ...

    def ready(self) -> None:
        """Everything that steps need has been captured and has run."""
        ...


class Pending(Protocol[T_co]):
    def result(self) -> T_co:
        """Wait for the work and return its result, or raise what it raised."""
        ...


class Memory(Protocol):
    @property
    def device(self) -> torch.device: ...

    def available_bytes(self) -> int:
        """Bytes that may still be allocated on the device."""
        ...

    def total_bytes(self) -> int: ...

    def launch(self, step: Callable[[], T]) -> Pending[T]:
        """Run ``step`` in order after everything launched before, without making the caller wait
        for the device.  A device with its own queue may call ``step`` at once, since that only
        enqueues; one that computes on the calling thread uses a worker."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Any]]:
        """Begin copying small results to the host; gives numpy arrays.  Called inside ``launch``."""
        ...

    def synchronize(self) -> None: ...


class Collectives(Protocol):
    @property
    def world_size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Backend(Protocol):
    """An open device.  Properties are fixed for its life."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> DeviceInfo: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def attention(self) -> Attention: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def inputs(self) -> Inputs: ...

    @property
    def graphs(self) -> Graphs: ...

    @property
    def memory(self) -> Memory: ...

    @property
    def collectives(self) -> Collectives: ...

    def providers(self) -> dict[str, str]:
        """Which implementation serves each part or op, and why, for logs and ``explain``."""
        ...

    def close(self) -> None:
        """Give back everything; the object is not used afterwards."""
        ...


class StepExecutor(Protocol):
    """What the engine loop drives.  The core's executor is one; a backend may bring its own
    (tier 2), or a whole model behind it (tier 3)."""

    @property
    def limits(self) -> Limits: ...

    @property
    def max_steps_in_flight(self) -> int: ...

    def submit(self, plan: StepPlan) -> None:
        """Start a step without waiting for it.  Steps run in the order submitted."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted step and return what it sampled."""
        ...

    def close(self) -> None: ...
