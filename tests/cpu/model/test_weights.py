"""Loading: what goes wrong is named, what goes right costs one copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import ModelError, OutOfMemory, UnsupportedModel
from isthmus.model.read_file import PIECE_BYTES, FileReader
from isthmus.model.source import read_spec, resolve_model
from isthmus.model.weights import load_decoder
from isthmus.reference import ReferenceBackend, ReferenceMemory, ReferenceOps

UP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def llama(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    make_model("Llama", num_hidden_layers=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    make_model("Llama", num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def load(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    source = resolve_model(str(folder))
    return load_decoder(source, read_spec(source), ReferenceBackend(), dtype, 64, **{"progress": False, **options})


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named_with_its_shape(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelError, match=rf"lacks 1 tensors .*{UP} \[96, 64\]"):
        load(llama)


def test_a_wrong_shape_is_named_with_both_shapes(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({UP: torch.zeros(96, 65)}))
    with pytest.raises(ModelError, match=rf"{UP} has the shape \[96, 65\]; the config makes it \[96, 64\]"):
        load(llama)


def test_an_unknown_tensor_is_named(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({"model.layers.0.mlp.gate_proj.bias": torch.zeros(96)}))
    with pytest.raises(ModelError, match=r"no use for: model\.layers\.0\.mlp\.gate_proj\.bias"):
        load(llama)


def test_what_needs_no_place_is_ignored(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load(llama)


def test_a_spare_head_is_ignored_only_where_the_embedding_serves(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 64)}))
    load(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*lm_head\.weight \[128, 64\]"):
        load(tmp_path)


def test_a_quantised_tensor_is_refused(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({UP: torch.zeros(96, 64, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModel, match=f"{UP} is I8"):
        load(llama)


@pytest.mark.parametrize("keep", [0.7, 0.001, 0.0])
def test_a_file_cut_off_is_named(llama: Path, keep: float) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file .*fetch it again"):
        load(llama)


def test_a_file_that_ends_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    reader = FileReader()
    with pytest.raises(ModelError, match="short ends 28 bytes early"):
        reader.read_into(torch.empty(32), path, 0, torch.float32)
    reader.close()


def test_a_missing_shard_is_named(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of \d+ weight files, such as {first.name}"):
        load(sharded)


def test_an_index_that_names_what_is_not_there(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks the tensor model\.extra\.weight"):
        load(sharded)


def test_an_index_cannot_point_outside_its_folder(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'\.\./other\.safetensors', which is not a file of its own folder"):
        load(sharded)


def test_an_index_without_a_map(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="lacks 'weight_map'"):
        load(sharded)


def test_several_files_need_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(ModelError, match=f"safetensors files but no {INDEX}"):
        load(sharded)


def test_pickled_weights_are_never_read(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights .* never read"):
        load(llama)


def test_a_folder_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors file"):
        load(llama)


def test_an_unknown_dtype_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="'int4' is not one of float32, float16, bfloat16"):
        load(llama, "int4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_and_norms_stay_wide(llama: Path, dtype: str) -> None:
    stored = load_file(llama / "model.safetensors")
    decoder = load(llama, dtype)
    layer = decoder.layers[0]
    prefix = "model.layers.0."
    parts = [stored[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv.weight, torch.cat(parts).to(getattr(torch, dtype)))
    assert layer.attention_norm.dtype == torch.float32
    assert torch.equal(layer.attention_norm, stored[f"{prefix}input_layernorm.weight"])


def test_gemma_norms_are_offset_in_float32(make_model: Callable[..., Any], tmp_path: Path) -> None:
    options = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    make_model("Gemma2", **options).bfloat16().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(load(tmp_path, "bfloat16").ends.final_norm, stored.float() + 1.0)


def test_large_tensors_are_read_in_pieces_by_threads(tmp_path: Path) -> None:
    count = 2 * PIECE_BYTES // 4 + 12345
    values = np.arange(count + 3, dtype=np.float32)
    (tmp_path / "data").write_bytes(values.tobytes())
    reader = FileReader()
    for dtype in (torch.float32, torch.float64):
        found = torch.empty(count, dtype=dtype)
        reader.read_into(found, tmp_path / "data", 12, torch.float32)
        assert torch.equal(found, torch.from_numpy(values[3:]).to(dtype))
    reader.close()


def test_loading_in_inference_mode(llama: Path) -> None:
    with torch.inference_mode():
        decoder = load(llama, "bfloat16")
    assert torch.equal(decoder.ends.head.weight, load(llama, "bfloat16").ends.head.weight)


def test_random_weights_need_only_the_config(llama: Path, open_runner: Callable[..., Any]) -> None:
    (llama / "model.safetensors").unlink()
    decoder, again = load(llama, random_weights=True), load(llama, random_weights=True)
    assert torch.equal(decoder.layers[1].mlp.down.weight, again.layers[1].mlp.down.weight), "a fixed seed"
    assert decoder.layers[1].mlp.down.weight.std() == pytest.approx(96**-0.5, rel=0.05)
    assert torch.equal(decoder.ends.final_norm, torch.ones(64))


def test_random_weights_of_experts_and_gemma(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("Mixtral", num_local_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path / "mixtral")
    make_model("Gemma3", sliding_window=8).save_pretrained(tmp_path / "gemma")
    assert load(tmp_path / "mixtral", random_weights=True).layers[0].experts.weights.gate_up.std() > 0.1
    assert torch.equal(load(tmp_path / "gemma", random_weights=True).ends.final_norm, torch.ones(64))


class SmallMemory(ReferenceMemory):
    def total_bytes(self) -> int:
        return 100_000


def test_weights_that_cannot_fit_are_refused_before_any_is_read(llama: Path) -> None:
    source = resolve_model(str(llama))
    backend = ReferenceBackend(memory=SmallMemory(torch.device("cpu")))
    with pytest.raises(
        OutOfMemory, match=r"the weights take 0\.0 GB as float32; the device has 0\.0 GB: take a smaller"
    ):
        load_decoder(source, read_spec(source), backend, "float32", 64, progress=False)


class FullOps(ReferenceOps):
    def prepare_norm(self, weight: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")


def test_running_out_on_the_way_is_the_same_error(llama: Path) -> None:
    source = resolve_model(str(llama))
    backend = ReferenceBackend(ops=FullOps(torch.device("cpu")))
    with pytest.raises(OutOfMemory, match="the device ran out of memory"):
        load_decoder(source, read_spec(source), backend, "float32", 64, progress=False)


def test_the_bar_counts_every_byte(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(llama, progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err


def test_gemma3_of_a_vision_model_is_read_as_text(
    make_model: Callable[..., Any], assert_same_model: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    model = make_model("Gemma3", **options)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_tower.vision_model.head.weight"] = torch.zeros(2)
        tensors["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(2)

    edit(tmp_path, rename)
    assert_same_model(model, tmp_path)


def test_a_dense_model_upcycled_to_experts_is_the_same_model(
    make_model: Callable[..., Any], assert_same_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Equal experts whose weights sum to 1 compute what one of them does, whatever the router says."""
    model = make_model("Mistral", sliding_window=None)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(architectures=["MixtralForCausalLM"], num_local_experts=4, num_experts_per_tok=2)
    (tmp_path / "config.json").write_text(json.dumps(config))

    def upcycle(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            prefix = f"model.layers.{layer}."
            for old, new in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                weight = tensors.pop(f"{prefix}mlp.{old}_proj.weight")
                for expert in range(4):
                    tensors[f"{prefix}block_sparse_moe.experts.{expert}.{new}.weight"] = weight.clone()
            tensors[f"{prefix}block_sparse_moe.gate.weight"] = torch.randn(
                4, 64, generator=torch.Generator().manual_seed(layer)
            )

    edit(tmp_path, upcycle)
    assert_same_model(model, tmp_path)


def test_rotary_tables_reach_what_is_asked_for(llama: Path) -> None:
    source = resolve_model(str(llama))
    decoder = load_decoder(source, read_spec(source), ReferenceBackend(), "float32", 77, progress=False)
    assert decoder.layers[0].rotary.cos_sin.shape == (77, 16)


def test_a_spec_that_is_not_the_checkpoints(llama: Path) -> None:
    source = resolve_model(str(llama))
    spec = replace(read_spec(source), vocab_size=129)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has the shape \[128, 64\]; .*\[129, 64\]"):
        load_decoder(source, spec, ReferenceBackend(), "float32", 64, progress=False)
