"""Every architecture against transformers: tiny models with random weights, written by it and read by us."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ONE_SHARD = "1GB"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.4],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}
WINDOWS_TOO = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    shard_size: str = ONE_SHARD
    max_positions: int = 128
    older_config: dict[str, Any] = field(default_factory=dict)
    """Rotary settings as older versions wrote them, to be put in place of ``rope_parameters``."""


CASES = [
    Case("llama", "Llama", shard_size="60KB", older_config={"rope_theta": 10000.0, "rope_scaling": None}),
    Case("llama-tied-biases", "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    Case("llama3", "Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    Case(
        "llama3-older",
        "Llama",
        {"rope_parameters": LLAMA3},
        older_config={"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_theta": None}},
    ),
    Case("llama-linear", "Llama", {"rope_parameters": LINEAR, "head_dim": 32}),
    Case("llama-dynamic", "Llama", {"rope_parameters": DYNAMIC}),
    Case("llama-yarn", "Llama", {"rope_parameters": YARN}),
    Case("mistral-window", "Mistral", {"sliding_window": 8, "head_dim": 16}),
    Case("mistral", "Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    Case("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Case("qwen2-windows", "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    Case("qwen3", "Qwen3", {"head_dim": 32, "layer_types": None, "rope_parameters": YARN}, shard_size="60KB"),
    Case("phi3", "Phi3", {"sliding_window": 12}),
    Case(
        "phi3-longrope-long",
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        older_config={
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": LONGROPE["short_factor"],
                "long_factor": LONGROPE["long_factor"],
            },
        },
    ),
    Case("phi3-longrope-short", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    Case(
        "gemma2",
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    Case(
        "gemma3",
        "Gemma3",
        {"head_dim": 32, "sliding_window": 8, "layer_types": WINDOWS_TOO, "rope_parameters": GEMMA3_ROPES},
        older_config={
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    Case("mixtral", "Mixtral", {"num_local_experts": 8, **EXPERTS}, shard_size="200KB"),
    Case("mixtral-window", "Mixtral", {"num_local_experts": 8, "sliding_window": 8, **EXPERTS}),
    Case(
        "qwen3-moe",
        "Qwen3Moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 16,
            "mlp_only_layers": [0],
            "num_experts_per_tok": 3,
        },
    ),
    Case(
        "qwen3-moe-sparse-step",
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": False, "decoder_sparse_step": 2, **EXPERTS},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_transformers(
    case: Case, make_model: Callable[..., Any], assert_same_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(case.architecture, **case.options)
    model.save_pretrained(tmp_path, max_shard_size=case.shard_size)
    if case.shard_size != ONE_SHARD:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if case.older_config:
        path = tmp_path / "config.json"
        written = json.loads(path.read_text())
        del written["rope_parameters"]
        path.write_text(json.dumps({**written, **case.older_config}))
    spec = assert_same_model(model, tmp_path, case.max_positions).decoder.spec
    assert spec.eos_token_ids == (2,)
