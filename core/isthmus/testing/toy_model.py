"""A model for tests that is no model: 256 bytes and three special tokens, and a folder that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

BOS_TOKEN: Final = 256
EOS_TOKEN: Final = 257
PAD_TOKEN: Final = 258
VOCAB_SIZE: Final = 259
PRINTABLE: Final = (32, 95)
"""The first printable ASCII character, and how many there are."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_toy_model(folder: Path, max_model_len: int = 4096) -> Path:
    """Write a ``config.json`` and a tokenizer whose token ids are the bytes of the text; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": _config(max_model_len),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": max_model_len,
        },
        "tokenizer.json": _tokenizer(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    return folder


def _config(max_model_len: int) -> dict[str, Any]:
    # One that every reader of configs knows; the sizes mean nothing, since there are no weights.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "float32",
        "bos_token_id": BOS_TOKEN,
        "eos_token_id": EOS_TOKEN,
        "pad_token_id": PAD_TOKEN,
    }


def _tokenizer() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {BOS_TOKEN: "<s>", EOS_TOKEN: "</s>", PAD_TOKEN: "<pad>"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": content, **plain} for token, content in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(byte_characters())}, "merges": []},
    }


def byte_characters() -> list[str]:
    """The character by which a byte-level vocabulary writes each byte (GPT-2's ``bytes_to_unicode``)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
