"""The whole engine on a device: the CPU's tokens in fp32, graphs against eager steps, draws, logprobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus import LLM, SamplingParams
from isthmus.errors import Unsupported

Make = Callable[..., Path]
PROMPT_LENGTHS = (1, 5, 16, 17, 63, 64, 65, 130, 257, 600)


def prompts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 1000, length).tolist() for length in PROMPT_LENGTHS]


def tokens(model: Path, device: str, params: SamplingParams, **options: object) -> list[list[int]]:
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 512, "num_blocks": 200, **options}
    with LLM(str(model), device=device, skip_tokenizer_init=True, progress=False, **settings) as llm:
        outputs = llm.generate(prompts(), params, use_tqdm=False)
        assert all(output.outputs[0].finish_reason == "length" for output in outputs)
        return [list(output.outputs[0].token_ids) for output in outputs]


GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_greedy_tokens_equal_the_cpus_in_fp32(device_name: str, tiny_model: Make, variant: str) -> None:
    model = tiny_model(variant)
    expected = tokens(model, "cpu", GREEDY)
    assert tokens(model, device_name, GREEDY) == expected


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes_give_the_same_tokens(device_name: str, tiny_model: Make, block_size: int) -> None:
    model = tiny_model()
    assert tokens(model, device_name, GREEDY, block_size=block_size) == tokens(model, device_name, GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_give_the_tokens_of_eager_steps(device_name: str, tiny_model: Make, temperature: float) -> None:
    model = tiny_model()
    params = SamplingParams(temperature=temperature, top_p=0.9, seed=5, max_tokens=24, ignore_eos=True)
    captured = tokens(model, device_name, params)
    assert captured == tokens(model, device_name, params, enforce_eager=True)
    assert captured == tokens(model, device_name, params, overlap=False)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=20, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1.0, min_p=0.05, seed=4, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=24, ignore_eos=True),
        SamplingParams(
            temperature=1.0, presence_penalty=0.5, frequency_penalty=0.2, seed=1, max_tokens=24, ignore_eos=True
        ),
        SamplingParams(temperature=0.0, min_tokens=10, stop_token_ids=(2, 3), max_tokens=24, ignore_eos=True),
    ],
    ids=["top_k", "min_p", "repetition", "penalties", "min_tokens"],
)
def test_sampled_tokens_equal_the_cpus_in_fp32(device_name: str, tiny_model: Make, params: SamplingParams) -> None:
    """The noise is a hash and the cuts are thresholds, so even draws agree, but for near ties."""
    model = tiny_model()
    expected, found = tokens(model, "cpu", params), tokens(model, device_name, params)
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    assert same >= len(expected) - 1, f"{same} of {len(expected)} sequences agree"


def test_preemption_changes_nothing(device_name: str, tiny_model: Make) -> None:
    model = tiny_model()
    roomy = tokens(model, device_name, GREEDY, block_size=16, num_blocks=200)
    assert tokens(model, device_name, GREEDY, block_size=16, num_blocks=66) == roomy


def test_bf16_logprobs_are_near_the_cpus(device_name: str, tiny_model: Make) -> None:
    model = tiny_model("llama", torch.bfloat16)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, prompt_logprobs=2, ignore_eos=True)
    found = {}
    for device in ("cpu", device_name):
        with LLM(
            str(model), device=device, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024, progress=False,
            num_blocks=200, max_num_batched_tokens=512,
        ) as llm:  # fmt: skip
            outputs = llm.generate(prompts(), params, use_tqdm=False)
            found[device] = [[entry.logprob for entry in output.prompt_logprobs if entry] for output in outputs]
    for mine, theirs in zip(found[device_name], found["cpu"], strict=True):
        assert len(mine) == len(theirs)
        if mine:  # of tokens at random, so logits of some tens
            assert np.abs(np.array(mine) - np.array(theirs)).mean() < 0.15


def test_a_cache_of_8_bits_holds_twice_the_tokens_and_gives_nearly_the_same(device_name: str, tiny_model: Make) -> None:
    model = tiny_model("llama", torch.bfloat16)
    params = SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)
    found, blocks = [], []
    for kv_dtype in ("bfloat16", "fp8"):
        try:
            llm = LLM(
                str(model), device=device_name, dtype="bfloat16", kv_cache_dtype=kv_dtype, skip_tokenizer_init=True,
                max_model_len=1024, progress=False, kv_cache_memory=64 * 2**20, max_num_batched_tokens=512,
            )  # fmt: skip
        except Unsupported as error:
            pytest.skip(str(error))
        with llm:
            outputs = llm.generate(prompts(), params, use_tqdm=False)
            found.append([entry.logprob for output in outputs for entry in output.prompt_logprobs if entry])
            blocks.append(llm.ready.num_blocks)
    assert blocks[1] >= 2 * blocks[0]
    # Of tokens at random, so logits of some tens; a cache that was read wrongly is tens away.
    assert np.abs(np.array(found[0]) - np.array(found[1])).mean() < 0.5
