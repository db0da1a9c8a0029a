"""The bytes that each token stands for, which is all that decoding needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import tokenizers

from isthmus.errors import UnsupportedModel


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL: Final = _byte_level_alphabet()


class _Table(dict[int, bytes]):
    """Bytes by token id, made when first asked for: a vocabulary is mostly never seen."""

    def __init__(self, rule: TokenBytes, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._rule = rule
        self._skip = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._rule.num_ids:
            return b""  # and not kept: there is no end of such ids
        hidden = self._skip and self._rule.is_special(token_id)
        found = b"" if hidden else self._rule.compute(token_id)
        self[token_id] = found
        return found


class TokenBytes:
    """Token ids to bytes, by the rule of a tokenizer's decoder.

    Text is the UTF-8 decoding of the bytes of all tokens joined, invalid bytes becoming U+FFFD by
    the Unicode Standard's "maximal subpart" practice.  For byte-level vocabularies this is exactly
    what ``tokenizers`` decodes.  For byte fallback it is what SentencePiece decodes; ``tokenizers``
    differs where a run of byte tokens holds an invalid byte, since it then replaces the whole run,
    valid characters included.

    Raises :class:`UnsupportedModel` for a decoder whose text is not a concatenation of tokens.
    """

    def __init__(self, codec: tokenizers.Tokenizer) -> None:
        self._codec = codec
        self._special = frozenset(i for i, token in codec.get_added_tokens_decoder().items() if token.special)
        self.num_ids = 1 + max(codec.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the highest id."""
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self._prefix = ""
        self.strips_first_space = False
        """Whether a text's first character is dropped if it is a space: the encoder had added it."""
        if codec.decoder is None:
            self._prefix, self.strips_first_space = " ", True
        else:
            self._read(json.loads(codec.decoder.__getstate__()))
        self.all: Mapping[int, bytes] = _Table(self, skip_special_tokens=False)
        self.visible: Mapping[int, bytes] = _Table(self, skip_special_tokens=True)
        """The same with special tokens empty."""

    def _read(self, decoder: dict[str, Any]) -> None:
        kind = decoder["type"]
        if kind == "Sequence":
            for part in decoder["decoders"]:
                self._read(part)
        elif kind == "ByteLevel":
            self._byte_level = True
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Replace" and "String" in decoder["pattern"]:
            self._replacements.append((decoder["pattern"]["String"], decoder["content"]))
        elif kind == "Metaspace":
            self._replacements.append((decoder["replacement"], " "))
            self.strips_first_space = decoder.get("prepend_scheme", "always") != "never"
        elif kind == "Strip" and decoder["content"] == " " and decoder["stop"] == 0 and decoder["start"] <= 1:
            self.strips_first_space = decoder["start"] == 1
        elif kind != "Fuse":
            raise UnsupportedModel(
                f"the tokenizer decodes with {kind!r}, which is not known here; "
                "byte-level, byte-fallback and metaspace decoders are"
            )

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def compute(self, token_id: int) -> bytes:
        """The bytes of one token, empty for an id that the vocabulary does not have."""
        token = self._codec.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        if self._byte_level:
            try:
                return bytes([_BYTE_LEVEL[character] for character in token])
            except KeyError:  # an added token, written as itself
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        return (self._prefix + token).encode()
