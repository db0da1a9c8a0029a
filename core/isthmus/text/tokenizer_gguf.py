"""A tokenizer from a GGUF file's metadata, built anew for the ``tokenizers`` package."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from isthmus.errors import IsthmusError, ModelError, UnsupportedModel
from isthmus.model.gguf_file import open_gguf
from isthmus.text.pretokenizers import find_pre_rule
from isthmus.text.tokenizer_parts import TokenizerParts

logger = logging.getLogger(__name__)

_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_SPACE: Final = "▁"
_END_OF_TURN: Final = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Control tokens that end an answer even where the file names another: it has no list of them."""
_SPECIAL_KEYS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read_tokenizer_gguf(path: str | Path) -> TokenizerParts:
    """Raises :class:`ModelError` for a file without a vocabulary, :class:`UnsupportedModel` for an unknown kind."""
    metadata = open_gguf(Path(path)).metadata
    vocabulary = _Vocabulary(metadata, str(path))
    kind = str(metadata.get("tokenizer.ggml.model"))
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(kind)
    if build is None:
        raise UnsupportedModel(
            f"{path} has a tokenizer of kind {kind!r}; gpt2 (byte-level) and llama (SentencePiece BPE) are known. "
            "Use the model's safetensors folder, which brings its own tokenizer.json"
        )
    try:
        codec, add_bos = build(vocabulary)
        codec.post_processor = vocabulary.surround(add_bos)
    except IsthmusError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{path} has a vocabulary that is not consistent: {error}; convert it again") from error
    return TokenizerParts(
        codec=codec,
        special_tokens=vocabulary.special_tokens(),
        eos_token_ids=vocabulary.eos_token_ids(),
        bos_token_id=vocabulary.token_id("bos_token_id"),
        chat_templates=_chat_templates(metadata),
    )


class _Vocabulary:
    """The ``tokenizer.ggml`` keys of one file."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self._metadata = metadata
        self.path = path
        self.tokens: list[str] = self.required("tokens")
        types = self.get("token_type")
        self.types: list[int] = [1] * len(self.tokens) if types is None else types.tolist()
        if len(self.types) != len(self.tokens):
            raise ModelError(f"{path} has {len(self.tokens)} tokens but {len(self.types)} types; convert it again")
        self.ids = {token: index for index, token in enumerate(self.tokens)}

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def required(self, key: str) -> Any:
        found = self.get(key)
        if found is None:
            raise ModelError(f"{self.path} has no tokenizer.ggml.{key}; convert it again with its vocabulary")
        return found

    def token_id(self, key: str) -> int | None:
        found = self.get(key)
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    def add_to(self, codec: tokenizers.Tokenizer, *, normalized: bool) -> None:
        """Make whole what text must never be split inside of: control and user-defined tokens."""
        kinds = list(zip(self.tokens, self.types, strict=True))
        codec.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind in (_CONTROL, _UNKNOWN)]
        )
        codec.add_tokens(
            [AddedToken(token, special=False, normalized=normalized) for token, kind in kinds if kind == _USER_DEFINED]
        )

    def surround(self, add_bos: bool) -> processors.PostProcessor:
        """Puts the tokens around a text that the file asks for."""
        before = self.token_id("bos_token_id") if self.get("add_bos_token", add_bos) else None
        after = self.token_id("eos_token_id") if self.get("add_eos_token", False) else None
        special = [
            {"id": name, "ids": [token_id], "tokens": [self.tokens[token_id]]}
            for name, token_id in (("before", before), ("after", after))
            if token_id is not None
        ]
        single = [*(["before"] if before is not None else []), "$A", *(["after"] if after is not None else [])]
        return processors.TemplateProcessing(single=single, special_tokens=special)

    def special_tokens(self) -> dict[str, str]:
        ids = {name: self.token_id(key) for name, key in _SPECIAL_KEYS.items()}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def eos_token_ids(self) -> tuple[int, ...]:
        listed = [self.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        by_name = [self.ids.get(token) for token in _END_OF_TURN]
        listed += [found for found in by_name if found is not None and self.types[found] == _CONTROL]
        return tuple(dict.fromkeys(found for found in listed if found is not None))


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    if vocabulary.get("pre") is None:
        logger.warning("%s does not say how text is split; tokens may differ from the model's own", vocabulary.path)
    rule = find_pre_rule(vocabulary.get("pre", "default"))
    merges = [_split_merge(merge, vocabulary.path) for merge in vocabulary.required("merges")]
    codec = tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=rule.whole_words))
    if rule.normal_form_c:
        codec.normalizer = normalizers.NFC()
    codec.pre_tokenizer = rule.build()
    codec.decoder = decoders.ByteLevel()
    vocabulary.add_to(codec, normalized=False)
    return codec, rule.add_bos


def _split_merge(merge: str, path: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise ModelError(f"{path} has a merge that is not two tokens: {merge!r}; convert it again")
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    unknown = vocabulary.token_id("unknown_token_id")
    codec = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = bool(vocabulary.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    codec.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    codec.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    vocabulary.add_to(codec, normalized=not prefixed)
    return codec, True


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece's BPE as ranked merges: each way to join two pieces into a third, best score first.

    As in transformers' ``SentencePieceExtractor``.
    """
    ids = vocabulary.ids
    best_first = np.argsort(-vocabulary.required("scores"), kind="stable")
    merges: list[tuple[str, str]] = []
    for index in best_first.tolist():
        token = vocabulary.tokens[index]
        pairs = [
            (token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids
        ]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += pairs
    return merges


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {"default": metadata.get("tokenizer.chat_template")}
    for name in metadata.get("tokenizer.chat_templates", ()):
        found[name] = metadata.get(f"tokenizer.chat_template.{name}")
    return {name: template for name, template in found.items() if isinstance(template, str)}
