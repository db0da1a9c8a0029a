"""How text is split before byte-level merges, by the name that a GGUF file gives it.

``tokenizer.ggml.pre`` names a rule; the rules are those of each model's own ``tokenizer.json``,
as llama.cpp's ``llama-vocab.cpp`` lists them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from isthmus.errors import UnsupportedModel

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3: Final = _CL100K % "1,3"
_QWEN2: Final = _CL100K % "1"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(suffix)s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(suffix)s"
    r"|\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = _CASED % {"suffix": "", "digits": ""}
_GPT4O: Final = _CASED % {"suffix": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": "{1,3}"}
_CJK: Final = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
_DEEPSEEK3: Final = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FALCON_PUNCTUATION: Final = r"[\p{P}\$\+<=>\^~\|`]+"
_DEFAULT_PUNCTUATION: Final = r"[\p{P}\$\+<=>\^~\|]+"


@dataclass(frozen=True, slots=True)
class PreRule:
    """Regular expressions applied in turn, each match a piece of its own; then bytes."""

    patterns: tuple[str, ...]
    single_digits: bool = False
    whole_words: bool = False
    """A piece that is itself in the vocabulary is taken whole, whatever the merges give."""
    add_bos: bool = False
    """Whether a beginning-of-sequence token is put first where the file does not say."""
    normal_form_c: bool = False

    def build(self) -> PreTokenizer:
        steps: list[PreTokenizer] = [Digits(individual_digits=True)] if self.single_digits else []
        steps += [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
        return Sequence(steps)


_DIGITS_GPT2: Final = PreRule((_GPT2,), single_digits=True)
_PLAIN_GPT2: Final = PreRule((_GPT2,))
_WHOLE_LLAMA3: Final = PreRule((_LLAMA3,), whole_words=True, add_bos=True)
_PLAIN_LLAMA3: Final = PreRule((_LLAMA3,))
_NFC_QWEN2: Final = PreRule((_QWEN2,), normal_form_c=True)
_WHOLE_GPT4O: Final = PreRule((_GPT4O,))

PRE_RULES: Final[dict[str, PreRule]] = {
    "default": PreRule((_DEFAULT_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jais", "trillion", "granite-docling"), _PLAIN_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _WHOLE_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _PLAIN_LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _NFC_QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan"), PreRule((_QWEN2,))),
    **dict.fromkeys(("gpt-4o", "llama4"), _WHOLE_GPT4O),
    "tekken": PreRule((_TEKKEN,), whole_words=True, add_bos=True),
    "falcon": PreRule((_FALCON_PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-v3": PreRule((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
}


def find_pre_rule(name: str) -> PreRule:
    """Raises :class:`UnsupportedModel` for a name that is not known: a guess would split text wrongly."""
    rule = PRE_RULES.get(name)
    if rule is None:
        raise UnsupportedModel(
            f"the GGUF file's tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(PRE_RULES))}. "
            "Use the model's safetensors folder, which brings its own tokenizer.json"
        )
    return rule
