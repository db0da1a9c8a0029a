"""From what a user typed to a model's files, and to its :class:`ModelSpec`.  Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from isthmus.errors import ModelError
from isthmus.model.config import spec_from_config
from isthmus.model.gguf_config import spec_from_gguf
from isthmus.model.gguf_file import open_gguf
from isthmus.model.spec import ModelSpec

SMALL_FILES: Final = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
WEIGHT_FILES: Final = ["*.safetensors"]
NOT_FETCHED: Final = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.py"]
"""Folders (other formats of the same weights), pickles and code."""
MAX_JSON_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on this machine.  ``path`` is a folder for "safetensors" and the file for "gguf"."""

    name: str
    """As the user wrote it."""
    path: Path
    kind: Literal["safetensors", "gguf"]


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True) -> ModelSource:
    """Find a model: a folder with ``config.json``, a ``.gguf`` file, a folder with one, else a hub name.

    A hub's files are fetched unless they are in its cache; without ``weights`` only the small ones.  Raises
    :class:`ModelError` in one line that says what to do, and :class:`isthmus.errors.UnsupportedModel` before
    weights of an unknown architecture are fetched.
    """
    if not model:
        raise ModelError("no model was given; give a model folder, a .gguf file or a hub name (owner/model)")
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{model} is a file, but not a .gguf; give the folder that holds config.json")
        return ModelSource(name=model, path=path, kind="gguf")
    if path.is_dir():
        return _in_folder(model, path)
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1:
        raise ModelError(f"no file or folder {model!r}; give a model folder, a .gguf file or a hub name (owner/model)")
    source = ModelSource(name=model, path=_fetch(model, revision, SMALL_FILES), kind="safetensors")
    if not (source.path / "config.json").is_file():
        raise ModelError(f"the hub's {model!r} holds no config.json; GGUF files: download one and give its path")
    read_spec(source)
    if weights:
        source = ModelSource(name=model, path=_fetch(model, revision, SMALL_FILES + WEIGHT_FILES), kind="safetensors")
    return source


def read_spec(source: ModelSource) -> ModelSpec:
    """The model's spec, from ``config.json`` and ``generation_config.json`` or from GGUF metadata."""
    if source.kind == "gguf":
        return spec_from_gguf(open_gguf(source.path))
    config = source.path / "config.json"
    generation = source.path / "generation_config.json"
    return spec_from_config(read_json(config), str(config), read_json(generation) if generation.is_file() else None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; raises :class:`ModelError` naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is {size} bytes long; at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
    return value


def _in_folder(model: str, path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(name=model, path=path, kind="safetensors")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource(name=model, path=files[0], kind="gguf")
    if files:
        listed = ", ".join(f.name for f in files[:4])
        raise ModelError(f"folder {model} holds {len(files)} GGUF files ({listed}, ...); give the path of one")
    raise ModelError(f"folder {model} holds neither config.json nor a .gguf file; is it a model's folder?")


def _fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
    """A snapshot's folder in the hub's cache; its own progress bars show what is fetched."""
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_FETCHED)
    except errors.HFValidationError as error:
        raise ModelError(f"no folder {model!r}, and it is not a hub name (owner/model) either") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub's {model!r} asks you to accept its terms: do so on its page, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub's {model!r} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"no folder and no hub model {model!r}; check the spelling, or run `hf auth login` if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"no folder {model!r}, and the hub cannot be reached, nor is it in the hub's cache; "
            "check the network (and HF_HUB_OFFLINE), or give the path of a folder or .gguf file"
        ) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        detail = str(error).strip().splitlines()
        raise ModelError(
            f"fetching {model!r} from the hub failed: {detail[0] if detail else type(error).__name__}"
        ) from error
    return Path(folder)
