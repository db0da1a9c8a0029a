"""What a tokenizer is made of, whichever kind of file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    codec: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """By the name that chat templates use: ``bos_token``, ``eos_token``, ..."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """By name; the usual one is called ``default``."""
