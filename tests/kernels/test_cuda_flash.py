"""FlashAttention-3's adapter: over a stand-in for the function, and over the function where its wheel is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from neighbours import neighbour

from isthmus.contract import AttentionSpec
from isthmus_cuda.flash import FlashAttention, find_flash

STEPS = {
    "a prompt": [(0, 70)],
    "prompts": [(0, 33), (100, 40), (7, 2)],
    "decodes before": [(130, 1), (3, 1), (16, 50), (0, 5)],
    "decodes between": [(16, 50), (130, 1), (0, 9), (200, 1)],
}
LAYER = AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125)


attention_tests = neighbour(__file__, "test_attention")


@pytest.fixture
def function(attend_paged: Callable[..., None], device: torch.device, arch: str) -> Callable[..., None]:
    """FlashAttention's, in plain torch where the device is none that it serves."""
    if device.type != "cpu":
        provider = find_flash(arch, "auto")
        if provider.function is None:
            pytest.skip(provider.reason)
        return provider.function

    def standin(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **given: Any) -> None:
        starts = given["cu_seqlens_q"].tolist()
        lengths = [after - before for before, after in pairwise(starts)]
        used = lengths if given["seqused_q"] is None else given["seqused_q"].tolist()
        assert max(used) <= given["max_seqlen_q"] and given["is_causal"]
        spans = list(zip(starts, used, given["seqused_k"].tolist(), strict=False))
        attend_paged(
            query, keys, values, given["out"], spans, given["page_table"],
            scale=given["softmax_scale"], softcap=0.0, window=given["window_size_left"] + 1,
        )  # fmt: skip

    return standin


def step(
    function: Callable[..., None], device: torch.device, arch: str, spans: list[tuple[int, int]], layer: AttentionSpec
) -> Any:
    made = attention_tests.Step(device, arch, spans, layer, torch.bfloat16, attention_tests.LIMITS)
    made.triton = FlashAttention(device, attention_tests.launch_table(arch), 3, function)
    [cache] = made.triton.allocate([layer], attention_tests.LIMITS, "bfloat16")
    cache.keys.copy_(made.triton_cache.keys)
    cache.values.copy_(made.triton_cache.values)
    made.triton_cache = cache
    return made


@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
def test_a_step_as_the_host_knows_it(
    function: Callable[..., None], device: torch.device, arch: str, spans: list[tuple[int, int]]
) -> None:
    attention_tests.check(step(function, device, arch, spans, LAYER), no_singles=all(length > 1 for _, length in spans))


@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
def test_a_captured_step(
    function: Callable[..., None], device: torch.device, arch: str, spans: list[tuple[int, int]]
) -> None:
    """Padded, and with bounds instead of what the host would know."""
    attention_tests.check(step(function, device, arch, spans, LAYER), pad_tokens=7, pad_spans=2, bounded=True)


@pytest.mark.parametrize(
    "layer",
    [
        replace(LAYER, window=20),
        replace(LAYER, softcap=3.0),
        replace(LAYER, head_dim=96),
        replace(LAYER, heads=2, kv_heads=1, head_dim=128, scale=0.09),
        replace(LAYER, heads=2, kv_heads=1, head_dim=256, scale=0.06),
    ],
    ids=["window", "softcap", "dim96", "dim128", "dim256"],
)
def test_layers(function: Callable[..., None], device: torch.device, arch: str, layer: AttentionSpec) -> None:
    spans = STEPS["decodes between"]
    attention_tests.check(step(function, device, arch, spans, layer), pad_tokens=3, pad_spans=1, bounded=True)
