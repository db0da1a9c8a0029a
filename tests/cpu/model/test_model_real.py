"""Real GGUF files, where they are to be had, against transformers fed by the ``gguf`` package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from isthmus.model.gguf_file import open_gguf
from isthmus.model.source import read_spec, resolve_model

MODELS = Path(__file__).parents[3] / "models"
QUESTION = ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")


def real_file(variable: str, pattern: str) -> Path:
    named = os.environ.get(variable)
    found = [Path(named)] if named else sorted(MODELS.glob(pattern))
    if not found or not found[0].is_file():
        pytest.skip(f"no {MODELS / pattern}, and {variable} is not set")
    return found[0]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_file("ISTHMUS_TEST_GGUF", "SmolLM2-135M-Instruct*.gguf")


@pytest.fixture(scope="module")
def gemma3() -> Path:
    return real_file("ISTHMUS_TEST_GEMMA_GGUF", "gemma-3-270m*.gguf")


def fill(model: Any, path: Path, arch: gguf.MODEL_ARCH) -> Any:
    """Copy a file's tensors into a transformers model, undoing what llama.cpp's converter does."""
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    file = open_gguf(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, kind = name.rsplit(".", 1)
            found = f"{names.get_name(stem)}.{kind}"
            quantised = gguf.GGMLQuantizationType(file.tensors[found].type_number)
            value = gguf.quants.dequantize(file.raw(found), quantised).reshape(parameter.shape)
            if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            if arch == gguf.MODEL_ARCH.GEMMA3 and "norm" in name:
                value = value - 1
            parameter.copy_(torch.from_numpy(np.array(value)))
    return model.eval()


@pytest.fixture(scope="module")
def smollm2_folder(smollm2: Path, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same model as a hub has it: ``config.json`` and safetensors."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("smollm2")
    fill(transformers.LlamaForCausalLM(config), smollm2, gguf.MODEL_ARCH.LLAMA).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def test_metadata_and_bytes_are_read_as_the_package_reads_them(smollm2: Path) -> None:
    file = open_gguf(smollm2)
    reader = gguf.GGUFReader(smollm2)
    assert set(file.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in file.metadata.items():
        expected = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    for tensor in reader.tensors:
        assert file.tensors[tensor.name].shape == tuple(tensor.shape[::-1].tolist())
        assert np.array_equal(file.raw(tensor.name).reshape(-1), tensor.data.view(np.uint8).reshape(-1))


def test_gguf_and_safetensors_are_one_model(
    smollm2: Path, smollm2_folder: Path, open_runner: Callable[..., Any]
) -> None:
    """Read by both ways: equal weights, so equal logits to the bit, and the known answer."""
    words = open_gguf(smollm2).metadata["tokenizer.ggml.tokens"]
    prompt = [words.index(word) for word in QUESTION]
    by_gguf, by_folder = open_runner(smollm2), open_runner(smollm2_folder)
    assert torch.equal(by_gguf.logits(prompt, [5]), by_folder.logits(prompt, [5]))
    answer = by_folder.greedy(prompt, 2)
    assert [words[token] for token in answer] == ["ĠParis", "."]
    spec = read_spec(resolve_model(str(smollm2)))
    assert (spec.architecture, len(spec.layers), spec.max_position) == ("LlamaForCausalLM", 30, 8192)
    assert spec.eos_token_ids == read_spec(resolve_model(str(smollm2_folder))).eos_token_ids == (2,)


def test_smollm2_equals_transformers(smollm2_folder: Path, transformers: Any, open_runner: Callable[..., Any]) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(17, 49152, 100).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    found = open_runner(smollm2_folder).logits(tokens, [60, 40])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_gemma3_equals_transformers_past_its_window(
    gemma3: Path, transformers: Any, open_runner: Callable[..., Any]
) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        query_pre_attn_scalar=256,
        sliding_window=512,
        attn_implementation="eager",
    )
    model = fill(transformers.Gemma3ForCausalLM(config), gemma3, gguf.MODEL_ARCH.GEMMA3)
    tokens = np.random.default_rng(0).integers(10, 200_000, 540).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=20).logits[0]
    found = open_runner(gemma3, 560).logits(tokens, [520, 20])[-20:]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
