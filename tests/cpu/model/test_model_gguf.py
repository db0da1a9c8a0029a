"""GGUF files of every architecture, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from isthmus.model.dequantize import BLOCKS, dequantize_into
from isthmus.model.gguf_file import BLOCKS as KNOWN_TYPES

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    arch: str
    """What GGUF calls it."""
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("llama", "Llama", "llama", {"attention_bias": True}),
    Case("llama3-tied", "Llama", "llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    Case("qwen2", "Qwen2", "qwen2"),
    Case("qwen3-yarn", "Qwen3", "qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    Case("phi3-longrope", "Phi3", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    Case("gemma2", "Gemma2", "gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    Case("gemma3", "Gemma3", "gemma3", {**GEMMA, "num_hidden_layers": 7}),
    Case("mixtral", "Mixtral", "llama", {"num_local_experts": 8, "sliding_window": None, **EXPERTS}),
    Case(
        "qwen3-moe",
        "Qwen3Moe",
        "qwen3moe",
        {"num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16, **EXPERTS},
    ),
]


class Converter:
    """Writes a transformers model as GGUF, following llama.cpp's ``convert_hf_to_gguf.py``."""

    def __init__(self, case: Case, model: Any, path: Path) -> None:
        self.case = case
        self.model = model
        self.config = model.config
        self.writer = GGUFWriter(path, case.arch)
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
        self.names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)

    def write(self) -> None:
        self._metadata()
        self._rope()
        for name, parameter in self.model.named_parameters():
            if not (name == "lm_head.weight" and self.config.tie_word_embeddings):
                self._tensor(name, parameter.detach().numpy())
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def _metadata(self) -> None:
        config, writer = self.config, self.writer
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_token_list(["<|end|>" if i == 7 else f"t{i}" for i in range(config.vocab_size)])
        writer.add_token_types([3 if i == 7 else 1 for i in range(config.vocab_size)])
        if getattr(config, "sliding_window", None) and self.case.arch.startswith("gemma"):
            writer.add_sliding_window(config.sliding_window)
        if self.case.arch == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if hasattr(config, "num_experts_per_tok"):
            writer.add_expert_count(config.num_local_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            if self.case.arch == "qwen3moe":
                writer.add_expert_feed_forward_length(config.moe_intermediate_size)

    def _rope(self) -> None:
        rope = self.config.rope_parameters
        rope = rope.get("full_attention", rope)
        self.writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "yarn":
            self.writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            self.writer.add_rope_scaling_factor(rope["factor"])
            self.writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope["rope_type"] == "longrope":
            self.writer.add_rope_scaling_orig_ctx_len(self.config.original_max_position_embeddings)
            for kind in ("short", "long"):
                self.writer.add_tensor(f"rope_factors_{kind}.weight", np.float32(rope[f"{kind}_factor"]))
        if rope["rope_type"] == "llama3":
            plain = rope["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
            scaled = self.model.model.rotary_emb.inv_freq.numpy()
            self.writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))

    def _tensor(self, name: str, value: np.ndarray) -> None:
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(value, 2, axis=1)
            self._add(name.replace("gate_up_proj", "gate_proj.weight"), gate)
            self._add(name.replace("gate_up_proj", "up_proj.weight"), up)
        elif name.endswith("experts.down_proj"):
            self._add(f"{name}.weight", value)
        else:
            if self.case.arch.startswith("gemma") and "norm" in name:
                value = value + 1
            if self.case.arch == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = self.config.num_attention_heads if "q_proj" in name else self.config.num_key_value_heads
                value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            self._add(name, value)

    def _add(self, name: str, value: np.ndarray) -> None:
        stem, kind = name.rsplit(".", 1)
        mapped = self.names.get_name(stem)
        assert mapped is not None, stem
        self.writer.add_tensor(f"{mapped}.{kind}", np.ascontiguousarray(value))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_transformers(
    case: Case, make_model: Callable[..., Any], assert_same_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(case.architecture, **case.options)
    path = tmp_path / "tiny.gguf"
    Converter(case, model, path).write()
    runner = assert_same_model(model, path)
    assert runner.decoder.spec.architecture == f"{case.architecture}ForCausalLM"
    assert runner.decoder.spec.eos_token_ids == (2, 7), "the control token that ends a turn counts too"


def random_blocks(type_name: str, number: int, rows: int, columns: int) -> np.ndarray:
    """Bytes of a quantised matrix in which every bit may be set, but the scales are finite."""
    rng = np.random.default_rng(5)
    block_size, block_bytes = KNOWN_TYPES[number][1:]
    blocks = rng.integers(0, 256, (rows * columns // block_size, block_bytes), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(type_name, [0, 2])
    for at in halves:
        blocks[:, at : at + 2] = rng.standard_normal(len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("type_name", [*BLOCKS, "IQ4_NL"])
def test_dequantised_blocks_equal_the_package(type_name: str) -> None:
    number = int(GGMLQuantizationType[type_name])
    if type_name in BLOCKS:
        raw = random_blocks(type_name, number, 6, 512)
    else:  # one that only the package knows
        raw = np.tile(np.arange(18, dtype=np.uint8), (6, 16))
    expected = gguf.quants.dequantize(raw, GGMLQuantizationType(number))
    block_bytes = gguf.constants.GGML_QUANT_SIZES[GGMLQuantizationType(number)][1]
    found = torch.empty(6, 512)
    dequantize_into(found, torch.from_numpy(raw), type_name, number, block_bytes)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("number", KNOWN_TYPES)
def test_sizes_of_blocks_equal_the_package(number: int) -> None:
    kind = GGMLQuantizationType(number)
    assert KNOWN_TYPES[number] == (kind.name, *gguf.constants.GGML_QUANT_SIZES[kind])
