"""8-bit floats of AMD's architectures: every code there is."""

from __future__ import annotations

import pytest
import torch

from isthmus_rocm.architecture import KNOWN
from isthmus_rocm.fp8 import FNUZ, FORMS, OCP, to_fnuz
from isthmus_rocm.targets import TARGETS

CODES = torch.arange(256, dtype=torch.uint8)


def value_of(code: int, bias: int) -> float:
    """A finite e4m3 number, from its definition."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
    return sign * (mantissa / 8 * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - bias))


def test_every_architecture_has_its_form() -> None:
    assert tuple(FORMS) == KNOWN
    assert {arch for arch, form in FORMS.items() if form is FNUZ} == {"gfx942"}
    assert {arch for arch, form in FORMS.items() if form is OCP} == {"gfx950", "gfx1201"}
    # A cache of 8 bits is in the OCP form.
    assert all(FORMS[arch] is OCP for arch, target in TARGETS.items() if target.eight_bit_cache)


def test_torch_reads_both_forms_as_they_are_defined() -> None:
    ocp, fnuz = CODES.view(OCP).float(), CODES.view(FNUZ).float()
    for code in range(256):
        if code & 0x7F != 0x7F:
            assert ocp[code] == value_of(code, 7)
        if code != 0x80:
            assert fnuz[code] == value_of(code, 8)
    assert ocp[[0x7F, 0xFF]].isnan().all() and fnuz[0x80].isnan()


def test_every_code_keeps_its_value() -> None:
    weight = CODES.view(OCP)
    converted, scale = to_fnuz(weight, torch.tensor(0.75))
    assert converted.dtype == FNUZ and scale == 1.5
    assert torch.equal(weight.view(torch.uint8), CODES), "the checkpoint's tensor was changed"
    before, after = weight.float() * 0.75, converted.float() * scale
    assert torch.equal(before.isnan(), after.isnan()) and before.isnan().sum() == 2
    assert torch.equal(before.nan_to_num(0.0), after.nan_to_num(0.0))
    assert not torch.signbit(after[after == 0]).any(), "fnuz has one zero"
    changed = (converted.view(torch.uint8) != CODES).nonzero().flatten().tolist()
    assert changed == [0x7F, 0x80, 0xFF]


@pytest.mark.parametrize("scale_shape", [(), (16, 1), (16, 4)])
def test_scales_of_any_shape_and_weights_of_any_strides(scale_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(0, 256, (4, 16), generator=generator, dtype=torch.uint8).view(OCP).t()
    scale = torch.rand(scale_shape, generator=generator) + 0.1
    converted, doubled = to_fnuz(weight, scale)
    assert converted.shape == weight.shape and doubled.shape == scale.shape
    torch.testing.assert_close(converted.float() * doubled, weight.float() * scale, rtol=0, atol=0, equal_nan=True)


def test_another_dtype_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="float8_e4m3fnuz, not"):
        to_fnuz(CODES.view(FNUZ), torch.ones(()))
