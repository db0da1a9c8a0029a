"""What a forward holds while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_an_mlp_runs_with_nothing_of_the_attention_held(
    make_model: Callable[..., Any],
    open_runner: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model("Llama").save_pretrained(tmp_path)
    runner = open_runner(tmp_path)
    ops = runner.decoder._ops
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    linear, gated_activation = ops.linear, ops.gated_activation

    def noted(x: torch.Tensor, weight: Any) -> torch.Tensor:
        out = linear(x, weight)
        made.append(weakref.ref(out))
        return out

    def counted(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        held.append(sum(ref() is not None for ref in made))
        return gated_activation(gate_up, activation)

    monkeypatch.setattr(ops, "linear", noted)
    monkeypatch.setattr(ops, "gated_activation", counted)
    runner.logits(list(range(8)), [8])
    # The product that the activation works on, and no layer's qkv, attention or delta.
    assert held == [1] * len(runner.decoder.layers)
