"""Gaudi's 8-bit weights: ranges, rounding, checkpoints, and the vendor's operators as their schemas say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from isthmus_gaudi.fp8 import (
    FP8,
    GAUDI2_LIMIT,
    GAUDI3_LIMIT,
    Fp8Weight,
    from_checkpoint,
    has_fp8_gemm,
    linear_fp8,
    quantize,
)

LIMITS = [GAUDI2_LIMIT, GAUDI3_LIMIT]
CODES = torch.arange(256, dtype=torch.uint8).view(FP8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_gaudi2_reads(weight: Tensor) -> Tensor:
    """The numbers of e4m3 with bias 7 whose largest exponent is for infinities and NaN."""
    bits = weight.view(torch.uint8).int()
    exponent, mantissa = (bits >> 3) & 0xF, bits & 7
    magnitude = torch.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7).to(torch.float32)
    )
    magnitude = magnitude.masked_fill(exponent == 15, math.nan).masked_fill(
        (exponent == 15) & (mantissa == 0), math.inf
    )
    return torch.where(bits >= 128, -magnitude, magnitude)


def test_the_limits_are_the_largest_numbers_of_each_form() -> None:
    numbers = as_gaudi2_reads(CODES)
    assert numbers[numbers.isfinite()].max() == GAUDI2_LIMIT == torch.finfo(torch.float8_e4m3fnuz).max
    assert torch.finfo(FP8).max == GAUDI3_LIMIT
    within = CODES.float().abs() <= GAUDI2_LIMIT
    assert torch.equal(numbers[within], CODES.float()[within]), "bits within the limit mean the same"
    assert not numbers[~within].isfinite().any()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("limit", LIMITS)
def test_quantised_numbers_stay_in_range_and_near(limit: float, per_channel: bool) -> None:
    weight = random(48, 80) * torch.logspace(-6, 3, 48)[:, None]
    weight[5] = 0.0
    quantized = quantize(weight, limit, per_channel=per_channel)
    assert (quantized.out_features, quantized.in_features) == (48, 80)
    assert quantized.weight.dtype == FP8 and quantized.scale.shape == ((48, 1) if per_channel else (1, 1))
    assert quantized.weight.float().abs().max() == limit
    rows = quantized.weight.float().abs().amax(1)
    assert not per_channel or (rows[torch.arange(48) != 5] == limit).all()
    error = (quantized.dequantized() - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() / 16, quantized.scale / 1024) * 1.0001).all())
    assert torch.equal(quantized.dequantized()[5], torch.zeros(80))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_a_checkpoint_beyond_240_keeps_its_numbers(shape: tuple[int, ...]) -> None:
    weight = CODES.repeat(4, 1)
    weight[:2] = torch.where(CODES.float().abs() <= 240, CODES.float(), 1.0).to(FP8)  # two channels within 240
    weight = torch.where(weight.float().isnan(), 1.0, weight.float()).to(FP8)
    scale = torch.arange(1, 1 + max(1, math.prod(shape))).float().reshape(shape) * 0.75
    before = weight.float() * scale.reshape(-1, 1)

    converted = from_checkpoint(weight, scale, GAUDI2_LIMIT)
    assert converted.weight.float().abs().max() <= GAUDI2_LIMIT
    read = as_gaudi2_reads(converted.weight) * converted.scale
    assert torch.equal(read, converted.dequantized())
    odd = (weight.float() * 2**9 % 2 == 1) & (weight.float().abs() < 2.0**-5)
    halved = torch.tensor([False, False, True, True]) if scale.numel() == 4 else torch.tensor([True] * 4)
    lost = odd & halved[:, None]
    assert lost.any() and torch.equal(read[~lost], before[~lost])
    assert bool(((read - before).abs() <= before.abs().amax(1, keepdim=True) * 1e-5).all())
    if scale.numel() == 4:
        assert torch.equal(converted.weight[:2].view(torch.uint8), weight[:2].view(torch.uint8))

    whole = from_checkpoint(weight, scale, GAUDI3_LIMIT)
    assert torch.equal(whole.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(whole.dequantized(), before)


def test_a_checkpoint_of_another_form_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="float8_e4m3fnuz, not"):
        from_checkpoint(CODES.view(torch.float8_e4m3fnuz)[None], torch.ones(1), GAUDI2_LIMIT)
    with pytest.raises(AssertionError, match=r"\(2, 2\) scales for 2 channels"):
        from_checkpoint(CODES.repeat(2, 1), torch.ones(2, 2), GAUDI2_LIMIT)


@pytest.fixture
def operators() -> Iterator[None]:
    """The vendor's two operators on the CPU, with the schemas of Intel's ``eager_custom_op_register.cpp``."""
    if has_fp8_gemm():
        pytest.skip("the vendor's own operators are loaded")
    library = torch.library.Library("hpu", "FRAGMENT")
    library.define(
        "cast_to_fp8_v2(Tensor input, Tensor? scale=None, bool stochastic_rounding=False, bool is_amax=False, "
        "ScalarType dtype=None, int[]? scale_shape=None) -> (Tensor, Tensor)"
    )
    library.define(
        "fp8_gemm_v2(Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor? D, ScalarType out_dtype, "
        "Tensor? A_scale_inv=None, Tensor? B_scale_inv=None, Tensor? bias=None, bool accumulate=False, "
        "int[]? B_scale_shape=None) -> Tensor"
    )

    def cast(x: Tensor, scale: Tensor, stochastic: bool, is_amax: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert not stochastic and not is_amax
        return (x.float() * scale).clamp(-GAUDI2_LIMIT, GAUDI2_LIMIT).to(dtype), x.new_empty(0)

    def gemm(
        a: Tensor, trans_a: bool, b: Tensor, trans_b: bool, d: Tensor | None, out_dtype: torch.dtype,
        a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None, accumulate: bool = False,
    ) -> Tensor:  # fmt: skip
        assert a.dtype == b.dtype == FP8 and not trans_a and trans_b and d is None and not accumulate
        out = (as_gaudi2_reads(a) @ as_gaudi2_reads(b).t()) * a_scale * b_scale
        return (out if bias is None else out + bias.float()).to(out_dtype)

    library.impl("cast_to_fp8_v2", cast, "CompositeExplicitAutograd")
    library.impl("fp8_gemm_v2", gemm, "CompositeExplicitAutograd")
    yield
    library._destroy()
    assert not has_fp8_gemm()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_vendors_operators_give_the_product(operators: None, per_channel: bool, with_bias: bool) -> None:
    assert has_fp8_gemm()
    x = (random(7, 96, seed=1) * torch.logspace(-3, 3, 7)[:, None]).bfloat16()
    x[3] = 0.0
    bias = random(40, seed=2).bfloat16() if with_bias else None
    weight = quantize(random(40, 96) * torch.logspace(-1, 1, 40)[:, None], GAUDI2_LIMIT, per_channel=per_channel)
    weight = Fp8Weight(weight=weight.weight, scale=weight.scale, limit=weight.limit, bias=bias)
    exact = x.double() @ weight.dequantized().double().t() + (bias.double() if bias is not None else 0.0)
    out = linear_fp8(x, weight, native=True)
    assert out.dtype == torch.bfloat16
    for row in range(7):
        if exact[row].any():
            assert relative_error(out[row], exact[row]) < 0.05  # of activations in 8 bits
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_without_them_the_weight_is_taken_back(dtype: torch.dtype, tolerance: float) -> None:
    x, bias = random(5, 96, seed=1).to(dtype), random(40, seed=2).to(dtype)
    weight = quantize(random(40, 96), GAUDI2_LIMIT, bias=bias)
    exact = x.double() @ weight.dequantized().double().t() + bias.double()
    out = linear_fp8(x, weight, native=False)
    assert out.dtype == dtype and relative_error(out, exact) < tolerance
    assert relative_error(weight.dequantized(), random(40, 96)) < 0.03
