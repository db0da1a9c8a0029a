"""The one decoder: any :class:`ModelSpec`, in terms of a backend's parts.

Nothing here waits for the device or looks at a value, and every tensor of a step comes out of the backend's
own calls, so that a forward can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isthmus.contract.inputs import StepInputs
from isthmus.contract.parts import Attention, AttentionSpec, LinearWeight, Ops, QkNorm, RotarySpec
from isthmus.model.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Mlp:
    gate_up: LinearWeight
    down: LinearWeight


@dataclass(slots=True, kw_only=True)
class Experts:
    router: LinearWeight
    weights: Any
    """As the backend prepared them."""
    top_k: int
    renormalize: bool


@dataclass(slots=True, kw_only=True)
class Layer:
    """One layer's prepared weights, and what its calls need beside them.  Exactly one of ``mlp`` and ``experts``."""

    attention: AttentionSpec
    rotary: RotarySpec
    attention_norm: Tensor
    qkv: LinearWeight
    qk_norm: QkNorm | None
    output: LinearWeight
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Mlp | None
    experts: Experts | None
    post_mlp_norm: Tensor | None


@dataclass(slots=True, kw_only=True)
class Ends:
    """What comes before the first layer and after the last."""

    table: Any
    embedding_scale: float
    final_norm: Tensor
    head: LinearWeight


class Decoder:
    """Made by :func:`isthmus.model.weights.load_decoder`.  Holds no state of any step."""

    def __init__(self, spec: ModelSpec, ends: Ends, layers: Sequence[Layer], ops: Ops, attention: Attention) -> None:
        assert len(layers) == len(spec.layers)
        self.spec = spec
        self.ends = ends
        self.layers = tuple(layers)
        self._ops = ops
        self._attention = attention

    def forward(self, inputs: StepInputs, caches: Sequence[Any], wanted: Tensor | None = None) -> Tensor:
        """Run the step's tokens through all layers, writing their keys and values to ``caches``, one a layer.

        Returns hidden [tokens, hidden] as the last layer leaves it, before the final norm; or only
        the rows ``wanted`` (an int32 index), and then nothing of the others is computed after the
        last layer's attention.
        """
        ops, epsilon = self._ops, self.spec.norm_epsilon
        plan = self._attention.plan(inputs)
        residual = ops.embed(inputs.token_ids, self.ends.table, self.ends.embedding_scale)
        # One name for what is handed on: nothing of an attention is held while an MLP's wider products are.
        x: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            if x is None:
                x = ops.rms_norm(residual, layer.attention_norm, epsilon)
            else:
                x, residual = ops.add_rms_norm(x, residual, layer.attention_norm, epsilon)
            x = self._attend(layer, cache, x, plan, inputs)
            if wanted is not None and layer is self.layers[-1]:
                x, residual = ops.take_rows(x, wanted), ops.take_rows(residual, wanted)
            x = ops.linear(x, layer.output)
            if layer.post_attention_norm is not None:
                x = ops.rms_norm(x, layer.post_attention_norm, epsilon)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, epsilon)
            x = self._mlp(layer, x)
            if layer.post_mlp_norm is not None:
                x = ops.rms_norm(x, layer.post_mlp_norm, epsilon)
        assert x is not None, "a model has at least one layer"
        return ops.add(x, residual)

    def _attend(self, layer: Layer, cache: Any, x: Tensor, plan: Any, inputs: StepInputs) -> Tensor:
        qkv = self._ops.linear(x, layer.qkv)
        query = self._attention.rotate_and_store(qkv, cache, layer.attention, layer.rotary, layer.qk_norm, inputs)
        return self._attention.attend(query, cache, layer.attention, plan, inputs)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        ops, activation, mlp = self._ops, self.spec.activation, layer.mlp
        if mlp is not None:
            return ops.linear(ops.gated_activation(ops.linear(x, mlp.gate_up), activation), mlp.down)
        experts = layer.experts
        assert experts is not None
        return ops.experts(
            x,
            ops.linear(x, experts.router),
            experts.weights,
            top_k=experts.top_k,
            renormalize=experts.renormalize,
            activation=activation,
        )

    def logits(self, hidden: Tensor, index: Tensor | None) -> Tensor:
        """float32 logits [samples, vocab] of the rows ``index`` (int32) of ``hidden``; ``None`` takes all."""
        ops = self._ops
        rows = hidden if index is None else ops.take_rows(hidden, index)
        normed = ops.rms_norm(rows, self.ends.final_norm, self.spec.norm_epsilon)
        return ops.logits(normed, self.ends.head, self.spec.final_softcap)
