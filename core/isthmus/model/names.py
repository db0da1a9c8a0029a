"""What a checkpoint calls its tensors.  An architecture is one of these records and a config table entry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Tensor names, without ".weight" or ".bias".

    Names of a layer's tensors follow ``layer``, in which ``{layer}`` is its number.  A tuple of names is merged
    in that order.  In ``expert_gate_up`` and ``expert_down``, ``{expert}`` is an expert's number; without it the
    tensor holds all experts, first dimension.  ``""`` means that this family has no such tensor.
    """

    prefixes: tuple[str, ...] = ("model.", "", "language_model.model.", "model.language_model.")
    """Before all but the heads: the first under which the embedding is found."""
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")
    """The output projection: the first that is found."""
    layer: str = "layers.{layer}."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    post_attention_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    post_mlp_norm: str = ""
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"
    interleaved_rotary: bool = False
    """Rows of queries and keys pair up dimensions 2i and 2i + 1 for rotation; they are reordered at load."""
    ignored: tuple[str, ...] = (r"\.rotary_emb\.", r"^vision_tower\.", r"^(model\.)?(vision|multi_modal)", r"^mtp\.")
    """Patterns of tensors that a text decoder does not need."""

    def prefix(self, names: Collection[str]) -> str:
        """The prefix that this checkpoint uses; the first one where none is found."""
        return next((p for p in self.prefixes if f"{p}{self.embedding}.weight" in names), self.prefixes[0])

    def head(self, names: Collection[str]) -> str:
        return next((h for h in self.heads if f"{h}.weight" in names), self.heads[0])


LLAMA: Final = WeightNames()

PHI3: Final = replace(LLAMA, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

GEMMA: Final = replace(
    LLAMA,
    post_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)

MIXTRAL: Final = replace(
    LLAMA,
    router="block_sparse_moe.gate",
    expert_gate_up=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    expert_down="block_sparse_moe.experts.{expert}.w2",
)

GGUF: Final = WeightNames(
    prefixes=("",),
    embedding="token_embd",
    final_norm="output_norm",
    heads=("output",),
    layer="blk.{layer}.",
    attention_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    query_norm="attn_q_norm",
    key_norm="attn_k_norm",
    output="attn_output",
    mlp_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    router="ffn_gate_inp",
    expert_gate_up=("ffn_gate_exps", "ffn_up_exps"),
    expert_down="ffn_down_exps",
    ignored=(r"^rope_freqs\.", r"^rope_factors_(long|short)\."),
)
GGUF_LLAMA: Final = replace(GGUF, interleaved_rotary=True)
GGUF_PHI3: Final = replace(GGUF, qkv=("attn_qkv",), gate_up=("ffn_up",))
GGUF_GEMMA: Final = replace(GGUF, post_attention_norm="post_attention_norm", post_mlp_norm="post_ffw_norm")
