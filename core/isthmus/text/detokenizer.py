"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.text.tokenizer import Tokenizer


class Detokenizer:
    """One sequence's text.  The pieces joined are ``Tokenizer.decode`` of all its ids, for any ids.

    A piece ends at a character's end: bytes that may still become a character are kept until they
    do, until they cannot any more, or until :meth:`finish`.  Work per token is constant.

    ``continues`` says that the tokens follow a prompt, so that a leading space is text and not
    the encoder's.
    """

    __slots__ = ("_bytes", "_pending", "_strip_space")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = True) -> None:
        table = tokenizer.bytes
        self._bytes = table.visible if skip_special_tokens else table.all
        self._strip_space = table.strips_first_space and not continues
        self._pending = b""  # at most three bytes, the beginning of a character

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete, maybe empty."""
        table = self._bytes
        data = b"".join([table[token_id] for token_id in token_ids])
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        """What is left: a replacement character if the last one was never completed, else nothing."""
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text
