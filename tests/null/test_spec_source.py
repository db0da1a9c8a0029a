"""From what a user types to a model's files; every way in which that fails says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model.source import MAX_JSON_BYTES, read_spec, resolve_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "eos_token_id": 2,
}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def test_a_folder(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    source = resolve_model(str(tmp_path))
    assert (source.name, source.path, source.kind) == (str(tmp_path), tmp_path, "safetensors")
    assert read_spec(source).eos_token_ids == (2, 3)


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for typed in (file, tmp_path):
        source = resolve_model(str(typed))
        assert (source.path, source.kind) == (file, "gguf")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("./nowhere", r"no file or folder './nowhere'; give a model folder, a \.gguf file or a hub name"),
        ("models/nowhere.gguf", r"no file or folder 'models/nowhere\.gguf'"),
        ("a/b/c", "no file or folder 'a/b/c'"),
        ("", "no model was given; give a model folder"),
    ],
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(
    typed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        resolve_model(typed)


def test_folders_and_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither config\.json nor a \.gguf file"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"is a file, but not a \.gguf"):
        resolve_model(str(tmp_path / "weights.bin"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf, \.\.\.\); give the path of one"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"cannot read .*config\.json"),
        (b"\xff\xfe\x00", r"cannot read .*config\.json"),
        (b"[]", "must hold a JSON object; it holds a list"),
        (b"[" * 100_000, r"cannot read .*config\.json"),
    ],
)
def test_a_config_that_is_not_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_spec(resolve_model(str(tmp_path)))


def test_a_config_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ModelError, match="at most"):
        read_spec(resolve_model(str(tmp_path)))


class Hub:
    """Stands in for ``snapshot_download``."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder = folder
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: str, **options: Any) -> str:
        self.calls.append({"model": model, **options})
        if self.error is not None:
            raise self.error
        return str(self.folder)


def test_a_hub_name_fetches_what_is_needed_and_no_code_or_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    source = resolve_model("owner/model", "v2")
    assert (source.name, source.path, source.kind) == ("owner/model", tmp_path, "safetensors")
    small, whole = hub.calls
    assert small["model"] == whole["model"] == "owner/model"
    assert small["revision"] == whole["revision"] == "v2"
    assert "*.safetensors" not in small["allow_patterns"]
    assert "*.safetensors" in whole["allow_patterns"]
    assert not {"*.bin", "*.py", "*"} & set(whole["allow_patterns"])
    assert {"*.bin", "*.py", "*/*"} <= set(whole["ignore_patterns"])

    hub.calls.clear()
    resolve_model("owner/model", weights=False)
    assert len(hub.calls) == 1


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, architectures=["MambaForCausalLM"])
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        resolve_model("owner/model")
    assert len(hub.calls) == 1


def test_a_hub_model_of_gguf_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path))
    with pytest.raises(ModelError, match=r"holds no config\.json; GGUF files: download one and give its path"):
        resolve_model("owner/model")


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "http://hub.invalid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("x", response=RESPONSE), "no folder and no hub model .* check the spelling"),
        (errors.GatedRepoError("x", response=RESPONSE), "asks you to accept its terms"),
        (errors.RevisionNotFoundError("x", response=RESPONSE), "has no revision 'main'"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached"),
        (errors.HfHubHTTPError("503 busy\nmore", response=RESPONSE), "fetching .* failed: 503 busy$"),
        (OSError("No space left on device"), "failed: No space left on device"),
        (httpx.ConnectError("refused"), "failed: refused"),
        (errors.HFValidationError("x"), "is not a hub name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_goes_wrong_at_the_hub_is_one_line(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, error))
    with pytest.raises(ModelError, match=message) as raised:
        resolve_model("owner/model", "main")
    assert "\n" not in str(raised.value)
    assert "owner/model" in str(raised.value)
