"""Small models with random weights, as files that every part of the engine reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from isthmus.model.config import ARCHITECTURES
from isthmus.model.layout import layout_of
from isthmus.model.source import read_spec, resolve_model
from isthmus.testing.toy_model import VOCAB_SIZE, write_toy_model

MAX_LEN: Final = 256
SEED: Final = 20
_LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 257,
}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": _LLAMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 24,
        "tie_word_embeddings": True,
    },
    "mixtral": _LLAMA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
}


def write_tiny_model(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """Write model ``name`` of :data:`MODELS`: config, tokenizer and float32 weights, always the same ones."""
    write_toy_model(folder)
    (folder / "config.json").write_text(json.dumps(MODELS[name] | changes))
    spec = read_spec(resolve_model(str(folder), weights=False))
    generator = torch.Generator().manual_seed(SEED)
    weights: dict[str, torch.Tensor] = {}
    layout = layout_of(spec, ARCHITECTURES[spec.architecture].names, ())
    for part in sorted(layout.parts(), key=lambda part: part.name):
        numbers = torch.randn(part.shape, generator=generator)
        if len(part.shape) == 1:
            weights[part.name] = 1.0 - spec.norm_offset + 0.1 * numbers
        else:
            # Vocabularies wider than the rest, so that the likeliest token stands out.
            weights[part.name] = numbers * (1.0 if spec.vocab_size in part.shape else part.shape[-1] ** -0.5)
    save_file(weights, folder / "model.safetensors")
    return folder
