"""Incremental text equals decoding all at once, for any ids in any pieces."""

import functools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from isthmus.model.source import ModelSource
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.tokenizer import Tokenizer
from isthmus.text.tokenizer_parts import TokenizerParts

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is not there; make demo fetches it")
    return Tokenizer.load(ModelSource(name="smollm2", path=SMOLLM2, kind="gguf"))


@functools.cache
def sentencepiece(*, strip: bool) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Byte fallback: 256 bytes, spaces, letters and a few words."""
    words = ["▁", "▁the", "cat", "é", "日本", "▁▁", "a", "🎉", REPLACEMENT, "<0xZZ>"]
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    codec = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    codec.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    codec.add_special_tokens(["<s>"])
    return Tokenizer(TokenizerParts(codec=codec)), codec


def in_pieces(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)] if sizes else 1
        pieces.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*pieces, detokenizer.finish()]


SIZES = st.lists(st.integers(1, 5), max_size=8)


@given(ids=st.lists(st.integers(-1, 49160), max_size=40), sizes=SIZES, skip=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_byte_level_any_ids(smollm2: Tokenizer, ids: list[int], sizes: list[int], skip: bool) -> None:
    pieces = in_pieces(Detokenizer(smollm2, skip_special_tokens=skip), ids, sizes)
    assert "".join(pieces) == smollm2.decode(ids, skip)


@pytest.fixture(scope="module")
def partial(smollm2: Tokenizer) -> list[int]:
    """Ids of single bytes above 127: few among 49,152, so they are drawn on purpose."""
    spelt = [smollm2.token_bytes(i) for i in range(smollm2.vocab_size)]
    found = [i for i, raw in enumerate(spelt) if len(raw) == 1 and raw > b"\x7f"]
    assert len(found) > 60
    return found


@given(data=st.data(), sizes=SIZES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_byte_level_broken_characters(
    smollm2: Tokenizer, partial: list[int], data: st.DataObject, sizes: list[int]
) -> None:
    ids = data.draw(st.lists(st.one_of(st.sampled_from(partial), st.integers(17, 300)), max_size=30))
    assert "".join(in_pieces(Detokenizer(smollm2), ids, sizes)) == smollm2.decode(ids)
    assert smollm2.decode(ids) == smollm2._codec.decode(ids)  # what the package itself decodes


REAL_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT, max_codepoint=0x3FFFF), max_size=40
)


@given(text=REAL_TEXT)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_half_characters_of_real_text(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    pieces = in_pieces(Detokenizer(smollm2, skip_special_tokens=False), ids, [])
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == smollm2.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("strip", [False, True])
@given(ids=st.lists(st.integers(0, 267), max_size=30), sizes=SIZES, skip=st.booleans(), continues=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_byte_fallback_any_ids(strip: bool, ids: list[int], sizes: list[int], skip: bool, continues: bool) -> None:
    tokenizer, _ = sentencepiece(strip=strip)
    pieces = in_pieces(Detokenizer(tokenizer, skip_special_tokens=skip, continues=continues), ids, sizes)
    whole = tokenizer.decode(ids, skip)
    if continues and strip:  # the space that decoding by itself takes for the encoder's
        text = "".join(pieces)
        assert text == whole or text == f" {whole}"
    else:
        assert "".join(pieces) == whole


@pytest.mark.parametrize("strip", [False, True])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_byte_fallback_as_the_package_where_bytes_are_valid(strip: bool, text: str) -> None:
    tokenizer, codec = sentencepiece(strip=strip)
    ids = [2 + byte for byte in text.encode()] + [259, 260]
    assert tokenizer.decode(ids) == codec.decode(ids)
    assert "".join(in_pieces(Detokenizer(tokenizer, continues=False), ids, [])) == codec.decode(ids)


def test_a_character_is_shown_when_its_last_byte_comes(smollm2: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm2)
    ids = smollm2.encode("🎉")
    assert len(ids) > 1
    assert [detokenizer.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["🎉"]
    assert detokenizer.finish() == ""


def test_a_character_that_never_ends(smollm2: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm2)
    assert detokenizer.push(smollm2.encode("hi 🎉")[:-1]) == "hi "
    assert detokenizer.finish() == REPLACEMENT
    assert detokenizer.finish() == ""


def test_first_space_belongs_to_the_text_that_goes_on() -> None:
    tokenizer, _ = sentencepiece(strip=True)
    the = tokenizer.token_to_id("▁the")
    assert the is not None
    assert Detokenizer(tokenizer).push([the]) == " the"
    assert Detokenizer(tokenizer, continues=False).push([1, the]) == "the"
    assert tokenizer.decode([the, the]) == "the the"
