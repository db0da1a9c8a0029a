"""Published configurations to specs, and what is wrong with a config said in one line.  No torch."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model.config import spec_from_config
from isthmus.model.spec import ExpertSpec

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PHI_35_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
GEMMA2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}
MIXTRAL: dict[str, Any] = {
    **MISTRAL_7B,
    "architectures": ["MixtralForCausalLM"],
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
PUBLISHED = [LLAMA_31_8B, MISTRAL_7B, QWEN25_7B, QWEN3_30B_A3B, PHI_35_MINI, GEMMA2_2B, GEMMA3_4B, MIXTRAL]


def spec_of(config: dict[str, Any], **changes: Any) -> Any:
    return spec_from_config({**config, **changes}, "config.json")


def test_llama() -> None:
    spec = spec_of(LLAMA_31_8B)
    attention = spec.layers[31].attention
    assert (spec.hidden, spec.inner, spec.vocab_size, len(spec.layers)) == (4096, 14336, 128256, 32)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (32, 8, 128, 128**-0.5)
    assert (attention.window, attention.softcap, spec.dtype, spec.max_position) == (0, 0.0, "bfloat16", 131072)
    (rope,) = spec.ropes
    assert (rope.kind, rope.theta, rope.rotary_dim) == ("llama3", 500000.0, 128)
    assert rope.parameters["original_max_position_embeddings"] == 8192
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert not (spec.qkv_bias or spec.output_bias or spec.mlp_bias or spec.qk_norm or spec.tied_embeddings)


def test_a_generation_config_says_what_ends_a_text() -> None:
    spec = spec_from_config({**LLAMA_31_8B, "eos_token_id": 128001}, "c", {"eos_token_id": [128001, 128009]})
    assert spec.eos_token_ids == (128001, 128009)
    assert spec_of(LLAMA_31_8B, eos_token_id=None).eos_token_ids == ()


def test_mistral_windows() -> None:
    assert {layer.attention.window for layer in spec_of(MISTRAL_7B).layers} == {4096}
    assert {layer.attention.window for layer in spec_of(MISTRAL_7B, sliding_window=None).layers} == {0}


def test_qwen2_windows_are_off_unless_asked_for() -> None:
    spec = spec_of(QWEN25_7B)
    assert spec.qkv_bias and not spec.output_bias
    assert {layer.attention.window for layer in spec.layers} == {0}
    asked = spec_of(QWEN25_7B, use_sliding_window=True, max_window_layers=21, sliding_window=4096)
    assert [layer.attention.window for layer in asked.layers] == [0] * 21 + [4096] * 7


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert {layer.attention.window for layer in spec_of(PHI_35_MINI).layers} == {0}
    gemma = spec_of(GEMMA3_4B, text_config={**GEMMA3_4B["text_config"], "max_position_embeddings": 1024})
    assert {(layer.attention.window, layer.rope) for layer in gemma.layers} == {(0, 0), (0, 1)}, "rotation stays"


def test_qwen3_experts() -> None:
    spec = spec_of(QWEN3_30B_A3B)
    assert spec.qk_norm and not spec.qkv_bias
    assert {layer.experts for layer in spec.layers} == {
        ExpertSpec(num_experts=128, top_k=8, inner=768, renormalize=True)
    }
    mixed = spec_of(QWEN3_30B_A3B, mlp_only_layers=[1], decoder_sparse_step=2, num_hidden_layers=4)
    assert [layer.experts is not None for layer in mixed.layers] == [False, False, False, True]


def test_mixtral_always_renormalises() -> None:
    assert spec_of(MIXTRAL).layers[0].experts == ExpertSpec(num_experts=8, top_k=2, inner=14336, renormalize=True)


def test_phi3_longrope() -> None:
    (rope,) = spec_of(PHI_35_MINI).ropes
    assert (rope.kind, rope.rotary_dim) == ("longrope", 96)
    assert rope.parameters["original_max_position_embeddings"] == 4096
    assert rope.parameters["long_factor"] == (2.0,) * 48


def test_gemma2() -> None:
    spec = spec_of(GEMMA2_2B)
    assert [layer.attention.window for layer in spec.layers[:4]] == [4096, 0, 4096, 0]
    assert (spec.norm_offset, spec.post_norms, spec.tied_embeddings, spec.activation) == (1.0, True, True, "gelu_tanh")
    assert (spec.embedding_scale, spec.final_softcap) == (math.sqrt(2304), 30.0)
    assert spec.layers[0].attention.softcap == 50.0
    assert spec_of(GEMMA2_2B, query_pre_attn_scalar=144).layers[0].attention.scale == 144**-0.5


def test_gemma3_with_vision_is_read_as_text() -> None:
    spec = spec_of(GEMMA3_4B)
    assert [(layer.attention.window, layer.rope) for layer in spec.layers[:7]] == [(1024, 1)] * 5 + [(0, 0), (1024, 1)]
    assert [(rope.kind, rope.theta) for rope in spec.ropes] == [("linear", 1000000.0), ("default", 10000.0)]
    assert (spec.vocab_size, spec.layers[0].attention.heads, spec.dtype) == (262208, 8, "bfloat16")
    assert (spec.eos_token_ids, spec.qk_norm, spec.final_softcap) == ((1, 106), True, 0.0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("LlamaForCausalLMEagle", "LlamaForCausalLM"), ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), ("", "")],
)
def test_an_unknown_architecture_is_named_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"'{name}', which is not supported; the nearest that is: '{nearest}"):
        spec_of(LLAMA_31_8B, architectures=[name])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": None}, ModelError, "lacks 'architectures'"),
        ({"hidden_size": None}, ModelError, "lacks 'hidden_size', which must be an integer from 1 to"),
        ({"vocab_size": "many"}, ModelError, "'vocab_size' is 'many'; it must be an integer"),
        ({"num_key_value_heads": 5}, ModelError, r"'num_key_value_heads' is 5; it must be a divisor of .* \(32\)"),
        ({"hidden_act": "relu2"}, UnsupportedModel, "activation 'relu2' is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, UnsupportedModel, "dtype 'float8_e4m3fn' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, r"is quantised \(gptq\)"),
        ({"rope_scaling": {"type": "mrope"}}, UnsupportedModel, "rotary scaling 'mrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, ModelError, "rotary scaling 'linear' needs 'factor'"),
        ({"rope_scaling": [1]}, ModelError, "'rope_scaling' is .*; it must be an object"),
        ({"rope_theta": "big"}, ModelError, "'rope_theta' is 'big'; it must be a number"),
        ({"partial_rotary_factor": 0.3}, ModelError, "38 of 128 dimensions|must be even"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], error: type[ModelError], message: str) -> None:
    if changes.get("partial_rotary_factor"):
        changes = {"partial_rotary_factor": 39 / 128}
        message = "39 of 128 dimensions of a head are rotated; it must be even"
    with pytest.raises(error, match=f"config.json.*{message}"):
        spec_of(LLAMA_31_8B, **changes)


def test_experts_that_are_not_there_cannot_be_chosen() -> None:
    with pytest.raises(ModelError, match=r"'num_experts_per_tok' is 9; it must be at most .* \(8\)"):
        spec_of(MIXTRAL, num_experts_per_tok=9)


def test_layer_types_must_fit() -> None:
    with pytest.raises(ModelError, match=r"'layer_types' is .*; it must be a list of 26 entries"):
        spec_of(GEMMA2_2B, layer_types=["full_attention"])
    with pytest.raises(UnsupportedModel, match="layer type 'chunked_attention' is not supported"):
        spec_of(GEMMA2_2B, layer_types=["chunked_attention"] * 26)


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    [],
    [1],
    ["x"],
    [[]] * 4,
    {},
    {"a": 1},
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["architectures"][0])
def test_junk_in_any_field_is_a_model_error_or_harmless(config: dict[str, Any]) -> None:
    inner = config.get("text_config", {})
    small = {"num_hidden_layers": 4}
    for name in [*config, *inner, "head_dim", "layer_types", "rope_parameters", "mlp_only_layers", "dtype"]:
        for junk in JUNK:
            changed = {**config, **small, name: junk}
            if inner and name in inner:
                changed = {**config, "text_config": {**inner, **small, name: junk}}
            if name == "num_hidden_layers" and junk == 10**30:
                continue
            try:
                spec_from_config(changed, "config.json")
            except ModelError as error:
                assert "\n" not in str(error)


def test_reading_specs_needs_no_torch() -> None:
    code = (
        "import sys, isthmus.model.source, isthmus.model.layout, isthmus.model.spec;"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
