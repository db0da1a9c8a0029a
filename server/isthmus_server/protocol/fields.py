"""Types of request fields, each with its bounds.

Checks run in time linear in the body's size, and an error never repeats the value that caused it
at length: a list of a million wrong entries is one error, not a million.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema

from isthmus.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

MAX_PROMPTS: Final = 1024
MAX_PROMPT_TOKENS: Final = 2**22
MAX_MESSAGES: Final = 8192
MAX_PARTS: Final = 4096
MAX_TOOLS: Final = 512
MAX_NAME: Final = 256
MAX_SALT: Final = 256
MAX_TOKEN_ID: Final = 2**31 - 1
MAX_ALLOWED_TOKEN_IDS: Final = 2**20
MAX_BAD_WORD: Final = 512
MAX_TEMPLATE_KWARGS: Final = 64

Prompt = str | list[str] | list[int] | list[list[int]]


def _is_token_list(values: list[Any]) -> bool:
    # type() and not isinstance(): a JSON true is no token.
    return all(type(value) is int and 0 <= value <= MAX_TOKEN_ID for value in values)


def check_prompt(value: object) -> Prompt:
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("is empty; give at least one text or token")
    if isinstance(value[0], int):
        return _check_tokens(value)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts; at most {MAX_PROMPTS} are taken in one request")
    if isinstance(value[0], str):
        if not all(isinstance(item, str) for item in value):
            raise ValueError("must hold texts alone or token lists alone")
        return value
    return [_check_tokens(item) for item in value]


def _check_tokens(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("must hold texts alone or token lists alone")
    if not 1 <= len(value) <= MAX_PROMPT_TOKENS:
        raise ValueError(f"holds a list of {len(value)} tokens; 1 to {MAX_PROMPT_TOKENS} are taken")
    if not _is_token_list(value):
        raise ValueError(f"must hold token ids alone, each from 0 to {MAX_TOKEN_ID}")
    return value


def _check_stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts[: MAX_STOP_STRINGS + 1]):
        raise ValueError("must be a text or a list of texts")
    if len(texts) > MAX_STOP_STRINGS:
        raise ValueError(f"holds {len(texts)} texts; at most {MAX_STOP_STRINGS} are taken")
    for text in texts:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"holds a text of {len(text)} characters; 1 to {MAX_STOP_LENGTH} are taken")
    return tuple(texts)


def _check_logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must map token ids to numbers from -100 to 100")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are taken")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = str(key)
        if len(token) > 10 or not token.isascii() or not token.isdigit():
            raise ValueError("must have token ids for its keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("must have numbers from -100 to 100 for its values")
        biases[int(token)] = float(bias)
    return biases


def _token_ids(most: int) -> PlainValidator:
    def check(value: object) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise ValueError("must be a list of token ids")
        if len(value) > most:
            raise ValueError(f"has {len(value)} entries; at most {most} are taken")
        if not _is_token_list(value):
            raise ValueError(f"must hold token ids alone, each from 0 to {MAX_TOKEN_ID}")
        return tuple(value)

    return PlainValidator(check)


def _check_bad_words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_BAD_WORDS:
        raise ValueError(f"must be a list of at most {MAX_BAD_WORDS} texts")
    for word in value:
        if not isinstance(word, str) or not 1 <= len(word) <= MAX_BAD_WORD:
            raise ValueError(f"must hold texts of 1 to {MAX_BAD_WORD} characters")
    return tuple(value)


def _salt(value: str) -> str:
    if len(value.encode("utf-8", "surrogatepass")) > MAX_SALT:
        raise ValueError(f"is longer than {MAX_SALT} bytes")
    return value


def _not_yet(value: object) -> None:
    if value is not None:
        raise ValueError("is not supported yet; leave it out")


_TEXT_SCHEMA = {"type": "string"}
_TOKEN_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}


def _list_of(items: dict[str, Any], most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


PromptField = Annotated[
    Any,
    PlainValidator(check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                _list_of(_TEXT_SCHEMA, MAX_PROMPTS, 1),
                {"type": "array", "items": _TOKEN_SCHEMA, "minItems": 1},
                _list_of({"type": "array", "items": _TOKEN_SCHEMA, "minItems": 1}, MAX_PROMPTS, 1),
            ]
        }
    ),
]
StopField = Annotated[
    tuple[str, ...],
    PlainValidator(_check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                _list_of({"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}, MAX_STOP_STRINGS),
                {"type": "null"},
            ]
        }
    ),
]
LogitBiasField = Annotated[
    dict[int, float],
    PlainValidator(_check_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                    "maxProperties": MAX_LOGIT_BIAS,
                },
                {"type": "null"},
            ]
        }
    ),
]
StopTokenIds = Annotated[
    tuple[int, ...], _token_ids(MAX_STOP_TOKEN_IDS), WithJsonSchema(_list_of(_TOKEN_SCHEMA, MAX_STOP_TOKEN_IDS))
]
AllowedTokenIds = Annotated[
    tuple[int, ...],
    _token_ids(MAX_ALLOWED_TOKEN_IDS),
    WithJsonSchema(_list_of(_TOKEN_SCHEMA, MAX_ALLOWED_TOKEN_IDS, 1)),
]
BadWords = Annotated[
    tuple[str, ...],
    PlainValidator(_check_bad_words),
    WithJsonSchema(_list_of({"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD}, MAX_BAD_WORDS)),
]

NotYet = Annotated[None, PlainValidator(_not_yet), WithJsonSchema({"type": "null"})]
"""A field of the API that changes the answer and is not implemented: any value but null is refused."""

Name = Annotated[str, Field(max_length=MAX_NAME)]
Salt = Annotated[str, Field(min_length=1, max_length=MAX_SALT), AfterValidator(_salt)]
Count = Annotated[int, Field(ge=1, le=MAX_N)]
TokenCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=MAX_SEED)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
Temperature = Annotated[float, Field(ge=0.0, le=100.0)]
Repetition = Annotated[float, Field(gt=0.0, le=100.0)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
