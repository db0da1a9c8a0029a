"""Text to token ids and back, for a model in any form that is read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from isthmus.errors import InvalidRequest
from isthmus.text.token_bytes import TokenBytes
from isthmus.text.tokenizer_folder import read_tokenizer_folder
from isthmus.text.tokenizer_gguf import read_tokenizer_gguf
from isthmus.text.tokenizer_parts import TokenizerParts

if TYPE_CHECKING:
    from isthmus.model.source import ModelSource

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
_ANCHOR = "\n"  # a character that no token joins to what follows it


class Tokenizer:
    """A model's vocabulary and its conventions.  Threads may share one; encoding releases the GIL."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._codec = parts.codec
        self._codec.no_padding()
        self._codec.no_truncation()
        self.bytes = TokenBytes(parts.codec)
        self.special_tokens: Mapping[str, str] = parts.special_tokens
        self.eos_token_ids = parts.eos_token_ids
        self.bos_token_id = parts.bos_token_id
        self.chat_templates: Mapping[str, str] = parts.chat_templates
        self.vocab_size = parts.codec.get_vocab_size(with_added_tokens=True)
        self._longest: int | None = None

    @classmethod
    def load(cls, source: ModelSource) -> Tokenizer:
        """The tokenizer in a model folder or a GGUF file.

        Raises :class:`isthmus.errors.ModelError` if there is none that can be used.
        """
        read = read_tokenizer_gguf if source.kind == "gguf" else read_tokenizer_folder
        return cls(read(source.path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.  Special tokens written in it are recognised.

        ``add_special_tokens`` puts in front (or behind) what the model expects around a text; a
        rendered chat has them already.  Raises :class:`InvalidRequest` for text that is not Unicode.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"the text holds a lone surrogate, {text[error.start]!r} at character {error.start}; "
                    "send valid Unicode"
                ) from error
        if len(texts) == 1:
            return [self._codec.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        found = self._codec.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of ``text`` as it continues another text: no special tokens, no space put in front."""
        if not self.bytes.strips_first_space:
            return self.encode(text, add_special_tokens=False)
        anchor = self.encode(_ANCHOR, add_special_tokens=False)
        return self.encode(_ANCHOR + text, add_special_tokens=False)[len(anchor) :]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; invalid UTF-8 becomes U+FFFD.  See :class:`TokenBytes`."""
        table = self.bytes.visible if skip_special_tokens else self.bytes.all
        data = b"".join([table[token_id] for token_id in token_ids])
        if self.bytes.strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling, such as ``Ġthe``; ``None`` if it has no such id."""
        return self._codec.id_to_token(token_id) if 0 <= token_id < self.bytes.num_ids else None

    def token_to_id(self, token: str) -> int | None:
        return self._codec.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for, special tokens included: maybe part of a character."""
        return self.bytes.all[token_id]

    def is_special(self, token_id: int) -> bool:
        return self.bytes.is_special(token_id)

    @property
    def chat_template(self) -> str | None:
        """The template for chats, ``None`` if the model brings none."""
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    def chat_template_for(self, *, tools: bool) -> str | None:
        """The template for chats with or without tools, for a model that has one for each."""
        return (self.chat_templates.get(TOOL_TEMPLATE) if tools else None) or self.chat_template

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of ``text``, without encoding it: no token is longer than the longest."""
        if self._longest is None:
            self._longest = max(map(len, self._codec.get_vocab(with_added_tokens=True)), default=1)
        return len(text) // max(self._longest, 1)
