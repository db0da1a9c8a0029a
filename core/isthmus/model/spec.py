"""A decoder-only language model as frozen data.  One implementation (``decoder.py``) runs them all."""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.contract.parts import AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding and its scaling, as a model's config states it.

    ``kind`` is "default", "linear", "dynamic", "llama3", "yarn" or "longrope"; ``parameters``
    are that kind's own numbers under their Hugging Face names.
    """

    theta: float = 10000.0
    rotary_dim: int = 0
    kind: str = "default"
    parameters: dict[str, float | tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    num_experts: int
    top_k: int
    inner: int
    renormalize: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    attention: AttentionSpec
    rope: int = 0
    """Index into ``ModelSpec.ropes``: models with windowed layers may rotate them differently."""
    experts: ExpertSpec | None = None
    """``None`` is a dense MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    architecture: str
    """The Hugging Face class name, such as LlamaForCausalLM."""
    vocab_size: int
    hidden: int
    inner: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    max_position: int
    norm_epsilon: float
    activation: str = "silu"
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    """Added to norm weights at load (Gemma stores w and computes with 1 + w)."""
    post_norms: bool = False
    """Norms after attention and after the MLP too, before each is added (Gemma 2, 3)."""
    embedding_scale: float = 1.0
    final_softcap: float = 0.0
    dtype: str = "float32"
    """The checkpoint's own dtype."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
