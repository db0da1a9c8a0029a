"""Tests that need a device, skipped where there is none.

pytest tests/device --isthmus-device=cuda     (with the package installed), or
ISTHMUS_KERNEL_DEVICE=cuda pytest tests/kernels tests/device
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def device_name() -> str:
    """The backend under test; these tests compare it with the CPU's reference."""
    name = os.environ.get("ISTHMUS_KERNEL_DEVICE", "cuda")
    if name == "cpu" or not torch.cuda.is_available():
        pytest.skip("no device here")
    return name


VARIANTS = {
    "llama": {},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


def write_model(folder: Path, variant: str, dtype: torch.dtype) -> Path:
    """A tiny model with random weights, in the files of the hub."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 1,
    } | VARIANTS[variant]
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    def ones(size: int) -> torch.Tensor:
        return (1.0 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    weights = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden) * 2,
        "model.norm.weight": ones(hidden),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = random(config["vocab_size"], hidden) * 8
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": ones(hidden),
            at + "post_attention_layernorm.weight": ones(hidden),
            at + "self_attn.q_proj.weight": random(heads, hidden),
            at + "self_attn.k_proj.weight": random(kv, hidden),
            at + "self_attn.v_proj.weight": random(kv, hidden),
            at + "self_attn.o_proj.weight": random(hidden, heads),
            at + "mlp.gate_proj.weight": random(inner, hidden),
            at + "mlp.up_proj.weight": random(inner, hidden),
            at + "mlp.down_proj.weight": random(hidden, inner),
        }
        if variant == "qwen3":
            weights |= {at + "self_attn.q_norm.weight": ones(dim), at + "self_attn.k_norm.weight": ones(dim)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A function from (variant, dtype) to a model folder."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(variant: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        key = (variant, dtype)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(variant), variant, dtype)
        return made[key]

    return make
