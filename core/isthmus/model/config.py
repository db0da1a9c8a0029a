"""``config.json`` to :class:`ModelSpec`: one table entry an architecture.  Imports no torch.

Field names and defaults are those of the Hugging Face configurations; both the older spelling of rotary
settings (``rope_theta``, ``rope_scaling``) and the newer one (``rope_parameters``) are read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from isthmus.contract.parts import AttentionSpec
from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model import names
from isthmus.model.names import WeightNames
from isthmus.model.rope_config import read_ropes
from isthmus.model.spec import ExpertSpec, LayerSpec, ModelSpec

ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
MAX_INTEGER: Final = 2**31 - 1
MAX_LAYERS: Final = 4096
DTYPES: Final = ("float32", "float16", "bfloat16")


class Fields:
    """A config's values, checked as they are read; errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values = {**(defaults or {}), **{k: v for k, v in values.items() if v is not None}}
        self.where = where

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def error(self, name: str, wanted: str) -> ModelError:
        if name not in self.values:
            return ModelError(f"{self.where} lacks {name!r}, which must be {wanted}; is the file complete?")
        return ModelError(f"{self.where}: {name!r} is {self.values[name]!r}; it must be {wanted}")

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_INTEGER) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number of at least 0."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self.error(name, "a number of at least 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, or one integer, or nothing."""
        value = self.values.get(name, ())
        listed = value if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in listed):
            raise self.error(name, "an integer or a list of integers")
        return tuple(listed)


Windows = Callable[[Fields, int], Sequence[int]]
"""Each layer's sliding window, 0 where it sees everything."""


def _layer_types(config: Fields, num_layers: int) -> list[bool] | None:
    types = config.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", f"a list of {num_layers} entries, one a layer")
    unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModel(f"{config.where}: layer type {unknown[0]!r} is not supported")
    return [t == "sliding_attention" for t in types]


def no_windows(_config: Fields, num_layers: int) -> Sequence[int]:
    return (0,) * num_layers


def every_layer(config: Fields, num_layers: int) -> Sequence[int]:
    """Mistral, Mixtral, Phi-3: all layers, if there is a window at all."""
    return (config.integer("sliding_window", 0, least=0),) * num_layers


def layers_from(config: Fields, num_layers: int) -> Sequence[int]:
    """Qwen2, Qwen3: off unless ``use_sliding_window``; then layers from ``max_window_layers`` on."""
    if not config.flag("use_sliding_window"):
        return (0,) * num_layers
    window = config.integer("sliding_window", 0, least=0)
    sliding = _layer_types(config, num_layers)
    if sliding is None:
        first = config.integer("max_window_layers", 28, least=0)
        sliding = [i >= first for i in range(num_layers)]
    return [window if s else 0 for s in sliding]


def all_or_none(config: Fields, num_layers: int) -> Sequence[int]:
    """Qwen3-MoE: all layers if ``use_sliding_window``."""
    return every_layer(config, num_layers) if config.flag("use_sliding_window") else (0,) * num_layers


def all_but_each(config: Fields, num_layers: int) -> Sequence[int]:
    """Gemma 2, 3: each ``sliding_window_pattern``-th layer sees everything, the others a window."""
    window = config.integer("sliding_window")
    sliding = _layer_types(config, num_layers)
    if sliding is None:
        pattern = config.integer("sliding_window_pattern")
        sliding = [(i + 1) % pattern != 0 for i in range(num_layers)]
    return [window if s else 0 for s in sliding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family.  ``defaults`` stand in for absent config fields; ``traits`` are fixed ModelSpec fields."""

    names: WeightNames = names.LLAMA
    defaults: Mapping[str, Any] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows = no_windows
    attention_bias: bool = False
    """``attention_bias`` of the config adds biases to q, k, v and o."""
    split_mlp_bias: bool = False
    """``mlp_bias`` of the config adds biases to the MLP."""
    query_scale: bool = False
    """``query_pre_attn_scalar`` gives the attention scale, instead of the head's size."""
    num_experts: str = ""
    """Name of the field that counts experts."""
    expert_inner: str = "intermediate_size"
    renormalize: bool = False
    """Expert weights sum to 1, whatever ``norm_topk_prob`` says."""


_GEMMA_TRAITS: Final = {"norm_offset": 1.0, "post_norms": True}
_GEMMA3 = Architecture(
    names=names.GEMMA,
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
    traits={**_GEMMA_TRAITS, "qk_norm": True},
    windows=all_but_each,
    attention_bias=True,
    query_scale=True,
)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "LlamaForCausalLM": Architecture(attention_bias=True, split_mlp_bias=True),
    "MistralForCausalLM": Architecture(windows=every_layer),
    "MixtralForCausalLM": Architecture(
        names=names.MIXTRAL,
        defaults={"rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2},
        windows=every_layer,
        num_experts="num_local_experts",
        renormalize=True,
    ),
    "Qwen2ForCausalLM": Architecture(traits={"qkv_bias": True}, windows=layers_from),
    "Qwen3ForCausalLM": Architecture(
        defaults={"head_dim": 128}, traits={"qk_norm": True}, windows=layers_from, attention_bias=True
    ),
    "Qwen3MoeForCausalLM": Architecture(
        traits={"qk_norm": True},
        windows=all_or_none,
        attention_bias=True,
        num_experts="num_experts",
        expert_inner="moe_intermediate_size",
    ),
    "Phi3ForCausalLM": Architecture(
        names=names.PHI3, defaults={"original_max_position_embeddings": 4096}, windows=every_layer
    ),
    "Gemma2ForCausalLM": Architecture(
        names=names.GEMMA,
        defaults={
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        traits=_GEMMA_TRAITS,
        windows=all_but_each,
        attention_bias=True,
        query_scale=True,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3TextModel": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
}


def nearest(architecture: str, known: Sequence[str]) -> str:
    return (difflib.get_close_matches(architecture, known, n=1, cutoff=0.0) or [known[0]])[0]


def unsupported(architecture: str, where: str, known: Sequence[str]) -> UnsupportedModel:
    listed = ", ".join(known)
    return UnsupportedModel(
        f"{where} names the architecture {architecture!r}, which is not supported; the nearest that is: "
        f"{nearest(architecture, known)!r} (all: {listed})"
    )


def find_architecture(config: Mapping[str, Any], where: str) -> tuple[str, Architecture]:
    """The table's entry for a config; raises :class:`UnsupportedModel`."""
    listed = config.get("architectures")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise ModelError(f"{where} lacks 'architectures', a list that names the model's class; is it a model's config?")
    name = listed[0]
    if name not in ARCHITECTURES:
        raise unsupported(name, where, list(ARCHITECTURES))
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"{where}: the checkpoint is quantised ({method}), which is not supported; use the unquantised model"
        )
    return name, ARCHITECTURES[name]


def spec_from_config(raw: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec of a parsed ``config.json`` and, if there is one, ``generation_config.json``.

    ``where`` names the file in errors.  Raises :class:`ModelError` or :class:`UnsupportedModel`.
    """
    name, architecture = find_architecture(raw, where)
    if isinstance(raw.get("text_config"), dict):
        outer = {k: raw[k] for k in ("eos_token_id", "bos_token_id", "dtype", "torch_dtype") if k in raw}
        raw = {**outer, **raw["text_config"]}
    config = Fields(raw, where, architecture.defaults)
    return _Reader(name, architecture, config, Fields(generation or {}, "generation_config.json")).spec()


class _Reader:
    """Reads one config's parts; they depend on each other's sizes."""

    def __init__(self, name: str, architecture: Architecture, config: Fields, generation: Fields) -> None:
        self.name = name
        self.architecture = architecture
        self.config = config
        self.generation = generation
        self.hidden = config.integer("hidden_size")
        self.num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
        self.heads = config.integer("num_attention_heads")
        self.head_dim = config.integer("head_dim", self.hidden // self.heads)

    def spec(self) -> ModelSpec:
        config, architecture = self.config, self.architecture
        if config.flag("use_bidirectional_attention"):
            raise UnsupportedModel(f"{config.where}: 'use_bidirectional_attention' is not supported; the model embeds")
        windows = architecture.windows(config, self.num_layers)
        ropes, windowed_rope = read_ropes(config.values, self.head_dim, config.where)
        bias = architecture.attention_bias and config.flag("attention_bias")
        traits: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, **architecture.traits}
        is_gemma = architecture.names is names.GEMMA
        return ModelSpec(
            architecture=self.name,
            vocab_size=config.integer("vocab_size"),
            hidden=self.hidden,
            inner=config.integer("intermediate_size"),
            layers=self._layers(windows, windowed_rope),
            ropes=ropes,
            max_position=config.integer("max_position_embeddings"),
            norm_epsilon=config.number("rms_norm_eps", 1e-6),
            activation=self._activation(),
            tied_embeddings=config.flag("tie_word_embeddings"),
            mlp_bias=architecture.split_mlp_bias and config.flag("mlp_bias"),
            embedding_scale=math.sqrt(self.hidden) if is_gemma else 1.0,
            final_softcap=config.number("final_logit_softcapping", 0.0) if is_gemma else 0.0,
            dtype=self._dtype(),
            eos_token_ids=self.generation.integers("eos_token_id") or config.integers("eos_token_id"),
            bos_token_id=next(iter(config.integers("bos_token_id")), None),
            **traits,
        )

    def _layers(self, windows: Sequence[int], windowed_rope: int) -> tuple[LayerSpec, ...]:
        experts = self._experts()
        longest = self.config.integer("max_position_embeddings")
        # A window that no sequence outgrows is none: it must not ask a backend for one.
        attention = {window: self._attention(window if window < longest else 0) for window in set(windows)}
        return tuple(
            LayerSpec(attention=attention[window], rope=windowed_rope if window else 0, experts=experts[i])
            for i, window in enumerate(windows)
        )

    def _attention(self, window: int) -> AttentionSpec:
        config = self.config
        kv_heads = config.integer("num_key_value_heads", self.heads)
        if self.heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of 'num_attention_heads' ({self.heads})")
        scaled_by = config.number("query_pre_attn_scalar") if self.architecture.query_scale else self.head_dim
        if not scaled_by:
            raise config.error("query_pre_attn_scalar", "more than 0")
        return AttentionSpec(
            heads=self.heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            scale=scaled_by**-0.5,
            window=window,
            softcap=config.number("attn_logit_softcapping", 0.0) if self.architecture.query_scale else 0.0,
        )

    def _experts(self) -> list[ExpertSpec | None]:
        """Each layer's experts; layers in ``mlp_only_layers`` or off ``decoder_sparse_step`` are dense."""
        config, architecture = self.config, self.architecture
        if not architecture.num_experts:
            return [None] * self.num_layers
        spec = ExpertSpec(
            num_experts=config.integer(
                "num_local_experts" if "num_local_experts" in config.values else architecture.num_experts
            ),
            top_k=config.integer("num_experts_per_tok"),
            inner=config.integer(architecture.expert_inner),
            renormalize=architecture.renormalize or config.flag("norm_topk_prob"),
        )
        if spec.top_k > spec.num_experts:
            raise config.error("num_experts_per_tok", f"at most the number of experts ({spec.num_experts})")
        dense = config.integers("mlp_only_layers")
        step = config.integer("decoder_sparse_step", 1)
        return [None if i in dense or (i + 1) % step else spec for i in range(self.num_layers)]

    def _activation(self) -> str:
        field_name = "hidden_activation" if "hidden_activation" in self.config.values else "hidden_act"
        value = str(self.config.values.get(field_name, "silu"))
        if value not in ACTIVATIONS:
            raise UnsupportedModel(
                f"{self.config.where}: the activation {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def _dtype(self) -> str:
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32").removeprefix("torch.")
        if dtype not in DTYPES:
            raise UnsupportedModel(
                f"{self.config.where}: the dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}"
            )
        return dtype
