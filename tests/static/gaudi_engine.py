"""What Gaudi's engine has beside the others', on the stand-in.

test_gaudi.py runs this file, with stand_in_engine.py for a plugin.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from stand_in_engine import ALONE, TIGHT

from isthmus.errors import BackendError
from isthmus.plugins import open_backend
from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.suite.engines import Arrangement, Engine, Outcome
from isthmus.testing.tiny_model import write_tiny_model
from isthmus_gaudi.fp8 import Fp8Weight
from isthmus_static.backend import StaticBackend

WIDTH = 512


def test_an_engine_gives_its_memory_back(fake: FakeDevice, tmp_path: Path) -> None:
    folder, left, backend = str(write_tiny_model(tmp_path, num_hidden_layers=1)), [], one_bucket()
    for _ in range(2):
        Engine(backend, folder, Arrangement(rows=1, tokens=32)).close()
        left.append(fake.allocated_bytes)
    assert left[0] == left[1]


@pytest.mark.parametrize("functionalize", [False, True], ids=["as traced", "functionalized"])
def test_layers_with_a_window_and_without_under_both_ways_to_compile(
    fake: FakeDevice, tmp_path: Path, prompts: list[list[int]], functionalize: bool
) -> None:
    """Vendors' compilers take a graph apart first, and its mutations with it."""
    folder = str(write_tiny_model(tmp_path, "gemma2"))
    expected = Engine(ReferenceBackend(), folder, ALONE).run(prompts, one_at_a_time=True)
    fake.compiler.functionalize = functionalize
    try:
        engine = Engine(one_bucket(), folder, TIGHT)
        assert engine.run(prompts).tokens == expected.tokens
        assert engine.stats.late_compiles == 0
        engine.close()
    finally:
        fake.compiler.functionalize = False


# 8-bit weights.


def wide_model(folder: Path) -> str:
    """One whose weights are not narrow."""
    return str(write_tiny_model(folder, hidden_size=WIDTH, intermediate_size=512, num_attention_heads=8))


def one_bucket(**options: str) -> StaticBackend:
    backend = open_backend("gaudi", {"token_buckets": "64", "span_buckets": "4", "block_buckets": "48", **options})
    assert isinstance(backend, StaticBackend)
    return backend


def tops(outcome: Outcome) -> dict[int, float]:
    """Log-probabilities of the first token's likeliest, by token."""
    return dict(outcome.logprobs[0][0].top)


def test_8_bit_weights_give_nearly_the_logits_of_whole_ones(
    fake: FakeDevice, tmp_path: Path, prompts: list[list[int]]
) -> None:
    folder, how = wide_model(tmp_path), Arrangement(rows=4, tokens=64, dtype="bfloat16")
    sampling = RowSampling(max_tokens=1, num_logprobs=20)
    found: dict[str, list[dict[int, float]]] = {}
    bytes_of: dict[str, int] = {}
    for name, backend in {"whole": one_bucket(), "fp8": one_bucket(fp8="on")}.items():
        engine = Engine(backend, folder, how)
        assert engine.report is not None
        bytes_of[name] = engine.report.weights_bytes
        found[name] = [tops(engine.run([prompt], sampling)) for prompt in prompts]
        engine.close()
    assert bytes_of["fp8"] < 0.7 * bytes_of["whole"]
    pairs = [(a[token], b[token]) for a, b in zip(*found.values(), strict=True) for token in a.keys() & b.keys()]
    # Each row of the output projection has numbers of deviation 1, and what it multiplies is normed.
    error = np.abs(np.subtract(*np.array(pairs).T)) / WIDTH**0.5
    print(f"fp8: {len(pairs)} of {20 * len(prompts)} likeliest tokens in both; off by {error.mean():.3f} deviations of")
    print(f"the logits on average, by {error.max():.3f} at most")
    assert len(pairs) > 0.8 * 20 * len(prompts)
    assert 0.0 < error.mean() < 0.06


def test_weights_are_within_the_devices_range_and_narrow_ones_whole(fake: FakeDevice) -> None:
    backend = one_bucket(fp8="on")
    weight = torch.randn(640, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    small = backend.ops.prepare_linear(weight)
    assert isinstance(small, Fp8Weight) and small.weight.device.type == small.scale.device.type == "hpu"
    assert small.limit == small.weight.cpu().float().abs().max() == 240
    assert not isinstance(backend.ops.prepare_linear(weight[:100]), Fp8Weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = (backend.ops.linear(x.to("hpu"), small).cpu() - x @ weight.t()).float()
    assert error.abs().max() < 0.03 * (x @ weight.t()).float().abs().max()
    assert re.search("8-bit weights within 240.*no fp8_gemm_v2", backend.providers()["linear"])


@pytest.mark.parametrize(
    ("kind", "limit"), [("GAUDI3", 448.0), ("GAUDI", None)], ids=["Gaudi 3", "the first generation"]
)
def test_another_generation(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, kind: str, limit: float | None) -> None:
    monkeypatch.setattr(fake, "kind", kind)
    if limit is None:
        with pytest.raises(BackendError, match="fp8=on needs one of GAUDI2, GAUDI3, and this device is GAUDI"):
            one_bucket(fp8="on")
        return
    small: Any = one_bucket(fp8="on").ops.prepare_linear(torch.ones(512, 16))
    assert small.limit == limit and small.weight.cpu().float().max() == limit


def test_an_unknown_option_is_one_line() -> None:
    for options, message in itertools.chain(
        [({"graphs": "lazy"}, "has no option graphs"), ({"fp8": "yes"}, "must be off or on")],
        [({"span_buckets": "a"}, "must be positive numbers")],
    ):
        with pytest.raises(BackendError, match=message):
            open_backend("gaudi", options)
