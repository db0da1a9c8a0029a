"""A tokenizer from a Hugging Face model folder: ``tokenizer.json`` and the files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import tokenizers

from isthmus.errors import ModelError
from isthmus.text.tokenizer_parts import TokenizerParts

_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer_folder(folder: str | Path) -> TokenizerParts:
    """Raises :class:`ModelError` if the folder has no usable ``tokenizer.json``."""
    root = Path(folder)
    codec = _read_codec(root)
    config = _read_json(root / "tokenizer_config.json")
    _add_missing_tokens(codec, config)
    special = _special_tokens(config, _read_json(root / "special_tokens_map.json"))
    bos = special.get("bos_token")
    return TokenizerParts(
        codec=codec,
        special_tokens=special,
        eos_token_ids=_eos_token_ids(root, codec, special),
        bos_token_id=None if bos is None else codec.token_to_id(bos),
        chat_templates=_chat_templates(root, config),
    )


def _read_codec(root: Path) -> tokenizers.Tokenizer:
    path = root / "tokenizer.json"
    if not path.is_file():
        raise ModelError(_missing_message(root))
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the package raises plain Exception
        raise ModelError(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {error}; "
            "fetch the file again or upgrade tokenizers"
        ) from error


def _missing_message(root: Path) -> str:
    if not root.is_dir():
        return f"{root} is not a folder; name a model folder, a .gguf file or a hub name"
    for name in ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json"):
        if (root / name).is_file():
            return (
                f"{root} has {name} but no tokenizer.json, the one form read here; make it once with "
                f"transformers: AutoTokenizer.from_pretrained({str(root)!r}).save_pretrained({str(root)!r})"
            )
    return f"{root} has no tokenizer.json; add it, or pass token ids with skip_tokenizer_init"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, not an object; fetch the file again")
    return found


def _token_text(value: Any) -> str | None:
    """A special token is written as a string, or as an object with its ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for values in (special_map, config):  # the configuration has the last word
        for name in _SPECIAL_NAMES:
            text = _token_text(values.get(name))
            if text is not None:
                found[name] = text
    return found


def _add_missing_tokens(codec: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only ``tokenizer_config.json`` has, where their ids are the next free ones."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _token_text(entry)
        if text is None or codec.token_to_id(text) is not None or int(token_id) != codec.get_vocab_size():
            continue
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        token = tokenizers.AddedToken(text, special=bool(entry.get("special")), **flags)
        (codec.add_special_tokens if entry.get("special") else codec.add_tokens)([token])


def _eos_token_ids(root: Path, codec: tokenizers.Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's, and those that the model is generated with."""
    listed = _read_json(root / "generation_config.json").get("eos_token_id")
    if listed is None:
        listed = _read_json(root / "config.json").get("eos_token_id")
    ids = [listed] if isinstance(listed, int) else list(listed or ())
    own = special.get("eos_token")
    if own is not None:
        ids.append(codec.token_to_id(own))
    return tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))


def _chat_templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """Every form in which a template is shipped; a file of its own goes before the configuration."""
    found: dict[str, str] = {}
    for value in (config.get("chat_template"), _read_json(root / "chat_template.json").get("chat_template")):
        if isinstance(value, str):
            found["default"] = value
        elif isinstance(value, list):
            found.update({entry["name"]: entry["template"] for entry in value})
    paths = {"default": root / "chat_template.jinja"}
    paths.update({path.stem: path for path in sorted((root / "additional_chat_templates").glob("*.jinja"))})
    for name, path in paths.items():
        if path.is_file():
            found[name] = path.read_text(encoding="utf-8")
    return found
