"""GGUF metadata to :class:`ModelSpec`.  Imports no torch.

Keys are those that llama.cpp writes; what it knows by architecture alone (Gemma's windows and scales, which
experts' weights sum to 1) is in the table here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from isthmus.contract.parts import AttentionSpec
from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model import names
from isthmus.model.config import MAX_LAYERS, Fields, unsupported
from isthmus.model.gguf_file import GgufFile
from isthmus.model.names import WeightNames
from isthmus.model.spec import ExpertSpec, LayerSpec, ModelSpec, RopeSpec

END_OF_TURN: Final = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
"""Control tokens that end an answer although some files do not name them as the end of text."""
CONTROL: Final = 3
"""``tokenizer.ggml.token_type`` of a control token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    hf_name: str
    names: WeightNames = names.GGUF
    traits: Mapping[str, Any] = field(default_factory=dict)
    window_pattern: int = 0
    """Each ``window_pattern``-th layer sees everything; 0: all layers have the window, if there is one."""
    local_theta: float = 0.0
    """Rotary base of layers with a window, where it is another."""
    query_scale: Callable[[int, int, int, int], float] = lambda hidden, heads, head_dim, layers: head_dim**-0.5


def _gemma_scale(layers_of_27b: int) -> Callable[[int, int, int, int], float]:
    """The 27B models divide by the width of a head as if heads filled the hidden size (as llama.cpp has it)."""

    def scale(hidden: int, heads: int, head_dim: int, layers: int) -> float:
        return float((hidden // heads if layers == layers_of_27b else head_dim) ** -0.5)

    return scale


_GEMMA_TRAITS: Final = {"post_norms": True, "activation": "gelu_tanh"}

ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = {
    "llama": GgufArchitecture(hf_name="LlamaForCausalLM", names=names.GGUF_LLAMA),
    "qwen2": GgufArchitecture(hf_name="Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture(hf_name="Qwen3ForCausalLM"),
    "qwen3moe": GgufArchitecture(hf_name="Qwen3MoeForCausalLM"),
    "phi3": GgufArchitecture(hf_name="Phi3ForCausalLM", names=names.GGUF_PHI3),
    "gemma2": GgufArchitecture(
        hf_name="Gemma2ForCausalLM",
        names=names.GGUF_GEMMA,
        traits=_GEMMA_TRAITS,
        window_pattern=2,
        query_scale=_gemma_scale(46),
    ),
    "gemma3": GgufArchitecture(
        hf_name="Gemma3ForCausalLM",
        names=names.GGUF_GEMMA,
        traits=_GEMMA_TRAITS,
        window_pattern=6,
        local_theta=10000.0,
        query_scale=_gemma_scale(62),
    ),
}


def find_architecture(file: GgufFile) -> tuple[str, GgufArchitecture]:
    """The table's entry for a file; raises :class:`UnsupportedModel`."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError(f"{file.path} lacks 'general.architecture'; is it a language model?")
    if name not in ARCHITECTURES:
        raise unsupported(name, str(file.path), list(ARCHITECTURES))
    return name, ARCHITECTURES[name]


def names_of(hf_name: str) -> WeightNames:
    """The names that a file of this architecture uses, by the name that its spec has."""
    by_name = {architecture.hf_name: architecture.names for architecture in ARCHITECTURES.values()}
    return by_name.get(hf_name, names.GGUF_LLAMA)


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """Raises :class:`ModelError` or :class:`UnsupportedModel`, naming the file and the key."""
    name, architecture = find_architecture(file)
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise UnsupportedModel(
            f"{file.path} is one of {parts} parts, which are not read; join them with `llama-gguf-split --merge`"
        )
    return _Reader(file, name, architecture).spec()


class _Reader:
    def __init__(self, file: GgufFile, name: str, architecture: GgufArchitecture) -> None:
        self.file = file
        self.name = name
        self.architecture = architecture
        own = {k.removeprefix(f"{name}."): v for k, v in file.metadata.items() if k.startswith(f"{name}.")}
        self.fields = Fields(own, f"{file.path} ({name}.*)")
        self.hidden = self.fields.integer("embedding_length")
        self.num_layers = self.fields.integer("block_count", most=MAX_LAYERS)
        self.heads = self._same("attention.head_count")
        self.head_dim = self.fields.integer("attention.key_length", self.hidden // self.heads)

    def spec(self) -> ModelSpec:
        fields, tensors, architecture = self.fields, self.file.tensors, self.architecture
        if fields.integer("attention.value_length", self.head_dim) != self.head_dim:
            raise UnsupportedModel(f"{self.file.path}: values of another size than keys are not supported")
        layer = architecture.names.layer.format(layer=0)
        is_gemma = architecture.names is names.GGUF_GEMMA
        hf_name, experts = architecture.hf_name, self._experts()
        if self.name == "llama" and experts is not None:
            hf_name = "MixtralForCausalLM"
        return ModelSpec(
            architecture=hf_name,
            vocab_size=self._vocab_size(),
            hidden=self.hidden,
            inner=self._same("feed_forward_length"),
            layers=self._layers(experts),
            ropes=self._ropes(),
            max_position=fields.integer("context_length"),
            norm_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
            tied_embeddings="output.weight" not in tensors,
            qkv_bias=f"{layer}{architecture.names.qkv[0]}.bias" in tensors,
            output_bias=f"{layer}{architecture.names.output}.bias" in tensors,
            mlp_bias=f"{layer}{architecture.names.down}.bias" in tensors,
            qk_norm=f"{layer}{architecture.names.query_norm}.weight" in tensors,
            embedding_scale=math.sqrt(self.hidden) if is_gemma else 1.0,
            final_softcap=fields.number("final_logit_softcapping", 0.0),
            dtype=self._dtype(),
            eos_token_ids=self._eos_token_ids(),
            bos_token_id=self._token_id("bos"),
            **architecture.traits,
        )

    def _same(self, key: str) -> int:
        """A count that some files give for each layer; here all must agree."""
        value = self.fields.get(key)
        if isinstance(value, np.ndarray):
            values = set(value.tolist())
            if len(values) != 1 or not isinstance(next(iter(values)), int):
                raise UnsupportedModel(f"{self.fields.where}: {key!r} differs between layers, which is not supported")
            return int(values.pop())
        return self.fields.integer(key)

    def _vocab_size(self) -> int:
        embedding = self.file.tensors.get(f"{self.architecture.names.embedding}.weight")
        if embedding is None:
            raise ModelError(f"{self.file.path} lacks the tensor 'token_embd.weight'; is it a whole language model?")
        return embedding.shape[0]

    def _layers(self, experts: ExpertSpec | None) -> tuple[LayerSpec, ...]:
        fields, architecture = self.fields, self.architecture
        kv_heads = self._same("attention.head_count_kv") if "attention.head_count_kv" in fields.values else self.heads
        if self.heads % kv_heads:
            raise fields.error("attention.head_count_kv", f"a divisor of the number of heads ({self.heads})")
        window = fields.integer("attention.sliding_window", 0, least=0)
        pattern = architecture.window_pattern
        layers = {}
        for windowed in (False, True):
            attention = AttentionSpec(
                heads=self.heads,
                kv_heads=kv_heads,
                head_dim=self.head_dim,
                scale=architecture.query_scale(self.hidden, self.heads, self.head_dim, self.num_layers),
                window=window if windowed and window < fields.integer("context_length") else 0,
                softcap=fields.number("attn_logit_softcapping", 0.0),
            )
            rope = 1 if windowed and architecture.local_theta else 0
            layers[windowed] = LayerSpec(attention=attention, rope=rope, experts=experts)
        return tuple(layers[window > 0 and (pattern == 0 or (i + 1) % pattern != 0)] for i in range(self.num_layers))

    def _experts(self) -> ExpertSpec | None:
        count = self.fields.integer("expert_count", 0, least=0)
        if not count:
            return None
        inner = self.fields.integer("feed_forward_length", 0) if self.name == "llama" else 0
        return ExpertSpec(
            num_experts=count,
            top_k=self.fields.integer("expert_used_count"),
            inner=inner or self.fields.integer("expert_feed_forward_length"),
            renormalize=True,
        )

    def _ropes(self) -> tuple[RopeSpec, ...]:
        fields = self.fields
        rotary_dim = fields.integer("rope.dimension_count", self.head_dim)
        if rotary_dim % 2 or rotary_dim > self.head_dim:
            raise fields.error("rope.dimension_count", f"even, and at most the size of a head ({self.head_dim})")
        full = RopeSpec(theta=self._theta("rope.freq_base"), rotary_dim=rotary_dim, **self._scaling(rotary_dim // 2))
        if not self.architecture.local_theta:
            return (full,)
        local = self._theta("rope.freq_base_swa", self.architecture.local_theta)
        return full, RopeSpec(theta=local, rotary_dim=rotary_dim)

    def _theta(self, key: str, default: float = 10000.0) -> float:
        theta = self.fields.number(key, default)
        if theta <= 1:
            raise self.fields.error(key, "more than 1")
        return theta

    def _factors(self, name: str, count: int) -> tuple[float, ...] | None:
        found = self.file.floats(name)
        if found is not None and (len(found) != count or not all(0 < value < math.inf for value in found)):
            raise ModelError(f"{self.file.path}: {name} must hold {count} numbers, each more than 0")
        return found

    def _scaling(self, count: int) -> dict[str, Any]:
        """Scaling by metadata, or by factors that the file holds as tensors."""
        fields = self.fields
        longest = float(fields.integer("context_length"))
        original = max(2.0, fields.number("rope.scaling.original_context_length", longest))
        parameters: dict[str, Any] = {
            "max_position_embeddings": longest,
            "original_max_position_embeddings": original,
        }
        divisors = self._factors("rope_freqs.weight", count)
        short, long = (self._factors(f"rope_factors_{kind}.weight", count) for kind in ("short", "long"))
        if divisors is not None:
            return {
                "kind": "longrope",
                "parameters": {
                    **parameters,
                    "short_factor": divisors,
                    "long_factor": divisors,
                    "attention_factor": 1.0,
                },
            }
        if short is not None and long is not None:
            parameters.update(short_factor=short, long_factor=long)
            if "rope.scaling.attn_factor" in fields.values:
                parameters["attention_factor"] = fields.number("rope.scaling.attn_factor")
            return {"kind": "longrope", "parameters": parameters}
        kind = str(fields.get("rope.scaling.type") or "") or (
            "linear" if "rope.scale_linear" in fields.values else "none"
        )
        if kind == "none":
            return {}
        if kind not in ("linear", "yarn"):
            raise UnsupportedModel(f"{fields.where}: rotary scaling {kind!r} is not supported; supported: linear, yarn")
        key = "rope.scaling.factor" if "rope.scaling.factor" in fields.values else "rope.scale_linear"
        factor = fields.number(key)
        if not factor:
            raise fields.error(key, "more than 0")
        return {"kind": kind, "parameters": {**parameters, "factor": factor}}

    def _dtype(self) -> str:
        """Quantised files compute well in bfloat16: its rounding is far below theirs."""
        matrices = {t.type_name for t in self.file.tensors.values() if len(t.shape) > 1}
        if matrices == {"F32"}:
            return "float32"
        return "float16" if matrices <= {"F16", "F32"} else "bfloat16"

    def _token_id(self, kind: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ModelError(f"{self.file.path}: tokenizer.ggml.{kind}_token_id is {value!r}; it must be an integer")
        return value

    def _eos_token_ids(self) -> tuple[int, ...]:
        metadata = self.file.metadata
        found = [self._token_id(kind) for kind in ("eos", "eot", "eom")]
        tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
        if isinstance(tokens, list) and isinstance(types, np.ndarray) and len(types) == len(tokens):
            found += [i for i, text in enumerate(tokens) if text in END_OF_TURN and types[i] == CONTROL]
        return tuple(dict.fromkeys(i for i in found if i is not None))
