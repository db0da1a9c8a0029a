"""Norms, activations, gathers and few-row products against the torch reference."""

from __future__ import annotations

import pytest
import torch

from isthmus.reference import ReferenceOps
from isthmus_triton.kernels.linear import LinearScratch, split_linear, vector_linear
from isthmus_triton.launch import LaunchTable, LinearRule, SplitLinear, VectorLinear, launch_table
from isthmus_triton.ops import TritonOps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def pair(device: torch.device, arch: str = "") -> tuple[TritonOps, ReferenceOps]:
    return TritonOps(device, launch_table(arch)), ReferenceOps(device)


def random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 96), (1, 257)])
def test_norms(device: torch.device, dtype: torch.dtype, rows: int, hidden: int) -> None:
    ours, reference = pair(device)
    x, residual = random(device, dtype, rows, hidden), random(device, dtype, rows, hidden, seed=1)
    weight = random(device, torch.float32, hidden, seed=2)
    close(ours.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    normed, our_total = ours.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    close(normed, expected)
    close(our_total, total)


def test_norm_of_more_dimensions(device: torch.device) -> None:
    ours, reference = pair(device)
    x, weight = random(device, torch.float32, 2, 3, 64), random(device, torch.float32, 64)
    close(ours.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    ours, reference = pair(device)
    x = random(device, dtype, 3, 2 * 100) * 3
    close(ours.gated_activation(x, activation), reference.gated_activation(x, activation))


def test_gated_activation_of_many_tokens_is_in_place(device: torch.device) -> None:
    ours, reference = pair(device)
    x = random(device, torch.float16, 520, 2 * 16)
    expected = reference.gated_activation(x, "silu")
    out = ours.gated_activation(x, "silu")
    assert out.data_ptr() == x.data_ptr()
    close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 7.3])
def test_embedding_and_row_gather(device: torch.device, dtype: torch.dtype, scale: float) -> None:
    ours, reference = pair(device)
    table = random(device, dtype, 50, 130)
    index = torch.tensor([0, 49, 7, 7], dtype=torch.int32, device=device)
    close(ours.embed(index, table, scale), reference.embed(index, table, scale))
    close(ours.take_rows(table, index), reference.take_rows(table, index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 256), (70, 200)])
def test_one_row_times_a_weight(
    device: torch.device, dtype: torch.dtype, bias: bool, out_features: int, in_features: int
) -> None:
    x, weight = random(device, dtype, 1, in_features), random(device, dtype, out_features, in_features, seed=1)
    addend = random(device, dtype, out_features, seed=2) if bias else None
    launch = VectorLinear(out_tile=8, in_tile=128, warps=4)
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if addend is None else addend.float())
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(
        vector_linear(x, weight, addend, launch).float(), expected, atol=16 * tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("splits", [1, 3])
def test_few_rows_times_a_weight(device: torch.device, dtype: torch.dtype, rows: int, splits: int) -> None:
    in_features, out_features = 200, 80
    x, weight = random(device, dtype, rows, in_features), random(device, dtype, out_features, in_features, seed=1)
    bias = random(device, dtype, out_features, seed=2)
    scratch = LinearScratch(device)
    launch = SplitLinear(out_tile=64, in_tile=32, splits=splits, stages=2, warps=4)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    tolerance = 4 * TOLERANCE[dtype]
    for _ in range(2):  # counters must be left at zero
        out = split_linear(x, weight, bias, launch, scratch)
        torch.testing.assert_close(out.float(), expected, atol=16 * tolerance, rtol=tolerance)


def test_table_chooses_the_product(device: torch.device) -> None:
    vector, split = (
        VectorLinear(out_tile=8, in_tile=64, warps=4),
        SplitLinear(out_tile=64, in_tile=32, splits=2, stages=2, warps=4),
    )
    base = launch_table("")
    table = LaunchTable(
        decode=base.decode,
        prefill=base.prefill,
        linear=(
            LinearRule(most_rows=1, launch=vector, most_out=128),
            LinearRule(least_rows=2, most_rows=4, launch=split, least_in=64),
        ),
    )
    assert table.linear_for(1, 128, 64) is vector
    assert table.linear_for(1, 129, 64) is None
    assert table.linear_for(4, 512, 64) is split
    assert table.linear_for(4, 512, 63) is None
    assert table.linear_for(5, 128, 64) is None
    ours, reference = TritonOps(device, table), ReferenceOps(device)
    weight = random(device, torch.float16, 128, 64)
    prepared, expected = ours.prepare_linear(weight), reference.prepare_linear(weight)
    for rows in (1, 3, 6):
        x = random(device, torch.float16, rows, 64, seed=rows)
        torch.testing.assert_close(ours.linear(x, prepared), reference.linear(x, expected), atol=0.1, rtol=0.02)
        torch.testing.assert_close(
            ours.logits(x, prepared, 30.0), reference.logits(x, expected, 30.0), atol=0.1, rtol=0.02
        )
        assert ours.logits(x, prepared, 0.0).dtype == torch.float32


def test_no_rows(device: torch.device) -> None:
    ours, _ = pair(device)
    weight = random(device, torch.float32, 64)
    empty = random(device, torch.float32, 0, 64)
    assert ours.rms_norm(empty, weight, 1e-5).shape == (0, 64)
    assert ours.take_rows(empty, torch.zeros(0, dtype=torch.int32, device=device)).shape == (0, 64)
    assert ours.gated_activation(empty, "silu").shape == (0, 32)
