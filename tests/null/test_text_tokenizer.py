"""Tokenizers from GGUF files and from tokenizer.json folders."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from isthmus.errors import InvalidRequest, ModelError, UnsupportedModel
from isthmus.model.gguf_file import open_gguf
from isthmus.model.source import ModelSource
from isthmus.text.pretokenizers import PRE_RULES
from isthmus.text.tokenizer import Tokenizer

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = [
    ("The capital of France is", [504, 3575, 282, 4649, 314]),
    ("a  12", [81, 256, 33, 34]),
    ("1234567", [33, 34, 35, 36, 37, 38, 39]),
    ("   lead", [256, 1022]),
    ("a\n\n\nb\t\tc", [81, 1116, 198, 82, 197, 197, 83]),
    ("don't I'LL", [12420, 982, 339, 23, 16421]),
    (
        "héllo wörld 日本語 🎉",
        [88, 2756, 31394, 267, 29989, 400, 17097, 241, 115, 40993, 179, 120, 248, 15107, 232, 227],
    ),
    ("½ Ⅷ ²", [16738, 216, 173, 223, 117, 216, 19133]),
    ("def f(x):\n    return x**2\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
]


def source(path: Path) -> ModelSource:
    return ModelSource(name=path.name, path=path, kind="gguf" if path.suffix == ".gguf" else "safetensors")


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is not there; make demo fetches it")
    return Tokenizer.load(source(SMOLLM2))


@pytest.fixture(scope="module")
def published_pipeline(smollm2: Tokenizer) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer.json as its authors wrote it: each digit, then GPT-2's byte level."""
    metadata = open_gguf(SMOLLM2).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    codec = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    codec.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    codec.decoder = decoders.ByteLevel()
    codec.add_special_tokens(tokens[:17])
    return codec


@pytest.mark.parametrize(("text", "ids"), CORPUS, ids=[text for text, _ in CORPUS])
def test_smollm2_ids(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_token_ids == (2, 0)
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.encode("x", add_special_tokens=True) == smollm2.encode("x", add_special_tokens=False)
    assert smollm2.decode([1, 504, 2]) == "The"
    assert "<|im_start|>" in (smollm2.chat_template or "")


# Its vocabulary lacks some bytes: a few control characters, and F1, that only characters above U+3FFFF begin with.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF),
    st.sampled_from("aZ'ts 0129\n\t ½é日"),
)


@given(text=st.text(CHARACTERS, max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_smollm2_as_published(smollm2: Tokenizer, published_pipeline: tokenizers.Tokenizer, text: str) -> None:
    assert smollm2.encode(text) == published_pipeline.encode(text).ids
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_batch_is_as_one_by_one(smollm2: Tokenizer) -> None:
    texts = [text for text, _ in CORPUS]
    assert smollm2.encode_batch(texts) == [smollm2.encode(text) for text in texts]


def test_ids_outside_the_vocabulary_are_empty(smollm2: Tokenizer) -> None:
    assert smollm2.decode([504, 49152, -1, 10**6, 2**32, -(2**63), 10**30]) == "The"
    assert smollm2.decode([504, 49152, 2**64], skip_special_tokens=False) == "The"
    assert [smollm2.id_to_token(token) for token in (-1, 49152, 2**32, 10**30)] == [None] * 4
    assert smollm2.token_bytes(49152) == b""


def test_lone_surrogate_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        smollm2.encode("a\ud800")


def test_fewest_tokens_is_a_lower_bound(smollm2: Tokenizer) -> None:
    for text in ["x" * 500, " " * 500, "=" * 500, "antidisestablishmentarianism" * 9]:
        assert smollm2.fewest_tokens(text) <= len(smollm2.encode(text))
    assert smollm2.fewest_tokens("x" * 100_000) > 100


SENTENCEPIECE = [
    ("<unk>", 2, 0.0),
    ("<s>", 3, 0.0),
    ("</s>", 3, 0.0),
    *((f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)),
    ("\n\n", 4, 0.0),
    ("▁t", 1, -1.0),
    ("he", 1, -2.0),
    ("▁the", 1, -3.0),
    ("ca", 1, -4.0),
    ("▁▁", 1, -5.0),
    *((letter, 1, -100.0) for letter in "▁abcehnt"),
]


def write_gguf(path: Path, **values: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = f"tokenizer.{'' if key.startswith('chat') else 'ggml.'}{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def sentencepiece(path: Path, **values: object) -> Tokenizer:
    tokens, types, scores = (list(column) for column in zip(*SENTENCEPIECE, strict=True))
    settings = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores} | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return Tokenizer.load(source(write_gguf(path / "m.gguf", **(settings | values))))


def spell(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.id_to_token(token) for token in tokenizer.encode(text)]


def test_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert spell(tokenizer, "the cat") == ["<s>", "▁the", "▁", "ca", "t"]
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.decode(tokenizer.encode("the cat")[1:], skip_special_tokens=False) == "the cat"


def test_sentencepiece_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert spell(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("naïve 🎉 the")) == "naïve 🎉 the"


def test_sentencepiece_without_prefix_keeps_spaces(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    assert spell(tokenizer, "the  cat\n\n") == ["t", "he", "▁▁", "ca", "t", "\n\n", "</s>"]
    assert tokenizer.decode(tokenizer.encode("  the ")) == "  the "


def test_inside_a_text_there_is_no_prefix(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode_inside("he")] == ["he"]
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode_inside(" the")] == ["▁the"]


def test_chat_templates_by_name(tmp_path: Path) -> None:
    tokenizer = sentencepiece(
        tmp_path, chat_template="plain", chat_templates=["tool_use"], **{"chat_template.tool_use": "tools"}
    )
    assert tokenizer.chat_template == "plain"
    assert tokenizer.chat_template_for(tools=True) == "tools"
    assert tokenizer.chat_template_for(tools=False) == "plain"


def byte_level(path: Path, pre: str, **values: object) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "ab", "<|begin|>", "<|eot_id|>"]
    kinds = [1] * (len(tokens) - 2) + [3, 3]
    settings = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": ["1 2", "12 3", "a b"]}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 2}
    return Tokenizer.load(source(write_gguf(path / "m.gguf", **(settings | ends | values))))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "1", "2"]),
        ("qwen2", ["1", "2", "3", "1", "2"]),
        ("gpt-2", ["123", "12"]),
        ("llama-bpe", ["<|begin|>", "123", "12"]),
        ("default", ["123", "12"]),
    ],
)
def test_digits_by_pre_rule(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    assert spell(byte_level(tmp_path, pre), "12312") == pieces


@pytest.mark.parametrize("pre", sorted(PRE_RULES))
def test_every_pre_rule_splits_without_loss(tmp_path: Path, pre: str) -> None:
    tokenizer = byte_level(tmp_path, pre)
    text = "It's 12345 o'clock,  PM\r\n\n日本 naïve\t{x}  <b>½</b> \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_turn_ends_are_found_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, "gpt-2")
    assert [tokenizer.id_to_token(token) for token in tokenizer.eos_token_ids] == ["<|begin|>", "<|eot_id|>"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"pre": "from-the-future"}, UnsupportedModel, "from-the-future"),
        ({"model": "bert"}, UnsupportedModel, "bert"),
        ({"token_type": [1]}, ModelError, "token types|types"),
        ({"merges": ["ab"]}, ModelError, "merge"),
        ({"merges": ["a q5"]}, ModelError, "not consistent"),
    ],
)
def test_bad_gguf_is_named(tmp_path: Path, values: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        byte_level(tmp_path, **({"pre": "gpt-2"} | values))  # type: ignore[arg-type]


def test_gguf_without_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.ggml\.tokens"):
        Tokenizer.load(source(write_gguf(tmp_path / "m.gguf", model="gpt2")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    codec = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    codec.add_special_tokens(["<s>", "</s>", "<|end|>"])
    codec.enable_truncation(4)
    codec.enable_padding(length=16)
    codec.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_folder(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    write_json(folder / "special_tokens_map.json", {"bos_token": "wrong", "pad_token": "</s>"})
    write_json(folder / "generation_config.json", {"eos_token_id": [258, 257]})
    tokenizer = Tokenizer.load(source(folder))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert tokenizer.bos_token_id == 256
    assert tokenizer.eos_token_ids == (258, 257)
    assert tokenizer.decode(tokenizer.encode("no padding, no truncation")) == "no padding, no truncation"
    assert len(tokenizer.encode("ab")) == 2
    assert tokenizer.chat_template is None


def test_folder_eos_from_config(folder: Path) -> None:
    write_json(folder / "config.json", {"eos_token_id": 257})
    assert Tokenizer.load(source(folder)).eos_token_ids == (257,)


def test_folder_tokens_of_the_configuration_are_added(folder: Path) -> None:
    added = {"259": {"content": "<|tool|>", "special": True}, "300": {"content": "<|gap|>", "special": True}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = Tokenizer.load(source(folder))
    assert tokenizer.encode("<|tool|>") == [259]
    assert tokenizer.token_to_id("<|gap|>") is None  # an id that is not the next would move others


def test_folder_templates_in_every_form(folder: Path) -> None:
    templates = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": templates})
    assert Tokenizer.load(source(folder)).chat_templates == {"default": "one", "tool_use": "two"}
    write_json(folder / "chat_template.json", {"chat_template": "three"})
    assert Tokenizer.load(source(folder)).chat_template == "three"
    (folder / "chat_template.jinja").write_text("four")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("five")
    assert Tokenizer.load(source(folder)).chat_templates == {"default": "four", "tool_use": "five"}


def test_folder_with_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05")
    with pytest.raises(ModelError, match=r"tokenizer.model but no tokenizer.json.*save_pretrained"):
        Tokenizer.load(source(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_folder_with_a_broken_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        Tokenizer.load(source(folder))


def test_folder_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.load(source(tmp_path))
    with pytest.raises(ModelError, match="not a folder"):
        Tokenizer.load(source(tmp_path / "nowhere"))


def test_unknown_decoder_is_named(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    write_json(folder / "tokenizer.json", settings)
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer.load(source(folder))


def test_metaspace_folder(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6}
    codec = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    codec.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    codec.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    codec.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(source(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a ab é")) == "a ab é"
    assert np.array_equal(tokenizer.encode("a"), [4])
