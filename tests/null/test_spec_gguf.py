"""GGUF headers: what they say, and that no broken one does worse than a :class:`ModelError`."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model.gguf_config import spec_from_gguf
from isthmus.model.gguf_file import open_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a", "<|im_end|>", "c"],
    "tokenizer.ggml.eos_token_id": 2,
}


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(v: Any) -> bytes:
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    if isinstance(v, list) and v and isinstance(v[0], str):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
    if isinstance(v, list):
        return struct.pack(f"<IIQ{len(v)}i", 9, 5, len(v), *v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    return struct.pack("<II", 4, v)


def gguf_bytes(metadata: dict[str, Any], *, kind: int = 0, rows: int = 3, tail: int = 3 * 32 * 4) -> bytes:
    """A file with one tensor, ``token_embd.weight`` [rows, 32]."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(metadata))
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    head += string("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, rows, kind, 0)
    return head + b"\0" * (-len(head) % 32) + b"\1" * tail


def write(folder: Path, content: bytes) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(content)
    return path


def spec_of(folder: Path, **changes: Any) -> Any:
    metadata = {**METADATA, **{k.replace("__", "."): v for k, v in changes.items()}}
    return spec_from_gguf(open_gguf(write(folder, gguf_bytes({k: v for k, v in metadata.items() if v is not None}))))


def test_a_small_file(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert (spec.architecture, spec.vocab_size, spec.hidden, spec.tied_embeddings) == ("LlamaForCausalLM", 3, 32, True)
    assert (spec.layers[0].attention.kv_heads, spec.dtype, spec.eos_token_ids) == (2, "float32", (2,))


def test_control_tokens_that_end_a_turn_count(tmp_path: Path) -> None:
    assert spec_of(tmp_path, tokenizer__ggml__token_type=[1, 3, 1]).eos_token_ids == (2, 1)
    assert spec_of(tmp_path, tokenizer__ggml__token_type=[1, 1, 1]).eos_token_ids == (2,)


def test_counts_given_for_each_layer(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, llama__block_count=2, llama__attention__head_count_kv=[1, 1])
    assert spec.layers[0].attention.kv_heads == 1
    with pytest.raises(UnsupportedModel, match=r"'attention\.head_count_kv' differs between layers"):
        spec_of(tmp_path, llama__block_count=2, llama__attention__head_count_kv=[1, 2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"general__architecture": "llamb"}, UnsupportedModel, "'llamb', which is not supported; .* 'llama'"),
        ({"general__architecture": None}, ModelError, r"lacks 'general\.architecture'"),
        ({"llama__block_count": None}, ModelError, "lacks 'block_count'"),
        ({"llama__embedding_length": "wide"}, ModelError, "'embedding_length' is 'wide'"),
        ({"llama__attention__head_count_kv": 3}, ModelError, r"a divisor of the number of heads \(2\)"),
        ({"llama__attention__value_length": 8}, UnsupportedModel, "values of another size than keys"),
        ({"llama__rope__scaling__type": "odd"}, UnsupportedModel, "rotary scaling 'odd' is not supported"),
        ({"llama__rope__dimension_count": 18}, ModelError, r"'rope\.dimension_count' is 18; .* at most .* \(16\)"),
        ({"llama__rope__freq_base": 1.0}, ModelError, r"'rope\.freq_base' is 1\.0; it must be more than 1"),
        (
            {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 0.0},
            ModelError,
            r"'rope\.scaling\.factor' is 0\.0; it must be more than 0",
        ),
        ({"split__count": 3}, UnsupportedModel, "is one of 3 parts, .* join them"),
        ({"tokenizer__ggml__eos_token_id": "two"}, ModelError, "eos_token_id is 'two'; it must be an integer"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], error: type[ModelError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        spec_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ModelError, r"cannot read .*m\.gguf"),
        (b"PK\3\4" + b"\0" * 60, ModelError, "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), UnsupportedModel, "is GGUF version 9"),
        (gguf_bytes(METADATA)[:-1], ModelError, r"'token_embd.weight' reaches 1 bytes past the end\); fetch it again"),
        (gguf_bytes(METADATA, kind=99), UnsupportedModel, "'token_embd.weight' has the type number 99"),
        (gguf_bytes(METADATA, kind=12), ModelError, r"has the shape \(3, 32\), which Q4_K cannot hold"),
        (gguf_bytes({**METADATA, "general.alignment": 0}), ModelError, r"general\.alignment is 0"),
    ],
)
def test_broken_files(content: bytes, error: type[ModelError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_gguf(write(tmp_path, content))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        open_gguf(tmp_path / "none.gguf")


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    whole = gguf_bytes(METADATA)
    for length in range(len(whole)):
        with pytest.raises(ModelError):
            open_gguf(write(tmp_path, whole[:length]))


@given(at=st.integers(0, 600), new=st.binary(min_size=1, max_size=8))
@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_changed_anywhere(at: int, new: bytes, tmp_path: Path) -> None:
    whole = bytearray(gguf_bytes(METADATA))
    whole[at : at + len(new)] = new
    with contextlib.suppress(ModelError):
        spec_from_gguf(open_gguf(write(tmp_path, bytes(whole))))
