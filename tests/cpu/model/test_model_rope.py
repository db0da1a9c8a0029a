"""Rotary tables against transformers' own frequencies, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.model.rope import cos_sin_table
from isthmus.model.rope_config import read_ropes

POSITIONS = 96
FACTORS = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("linear", {"factor": 4.0}, POSITIONS),
    ("dynamic", {"factor": 4.0}, POSITIONS),
    ("dynamic", {"factor": 2.0}, 1000),
    ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, POSITIONS),
    ("yarn", {"factor": 4.0}, POSITIONS),
    ("yarn", {"factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.8}, POSITIONS),
    ("yarn", {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}, POSITIONS),
    ("longrope", FACTORS, 64),
    ("longrope", FACTORS, 65),
    ("longrope", {**FACTORS, "attention_factor": 1.3}, POSITIONS),
]


@pytest.mark.parametrize(("kind", "numbers", "max_positions"), CASES)
def test_tables_equal_transformers(transformers: Any, kind: str, numbers: dict[str, Any], max_positions: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = {"rope_type": kind, "rope_theta": 50000.0, "original_max_position_embeddings": 64, **numbers}
    if kind in ("linear", "dynamic"):
        del stated["original_max_position_embeddings"]
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(stated)
    )
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=max_positions)
    angles = torch.arange(max_positions).float()[:, None] * inverse
    expected = torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1)

    ropes, windowed = read_ropes({"rope_parameters": stated, "max_position_embeddings": 256}, 16, "config.json")
    assert (len(ropes), windowed) == (1, 0)
    assert torch.equal(cos_sin_table(ropes[0], max_positions, torch.device("cpu")), expected)


def test_only_the_leading_dimensions_are_rotated() -> None:
    (rope,), _ = read_ropes({"rope_theta": 10000.0, "partial_rotary_factor": 0.75}, 32, "config.json")
    assert cos_sin_table(rope, 5, torch.device("cpu")).shape == (5, 24)
