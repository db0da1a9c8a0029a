"""Each compiled kernel against the reference's plain torch, over ragged shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.errors import BackendUnavailable, Unsupported
from isthmus.reference import ReferenceOps
from isthmus_cpu.build import kernels_library
from isthmus_cpu.library import Kind, Library, Pool
from isthmus_cpu.ops import PanelOps, round_to_bfloat16
from isthmus_cpu.runner import Runner

THREADS = 2
REFERENCE = ReferenceOps(torch.device("cpu"))


@dataclass
class Parts:
    library: Library
    runner: Runner
    ops: PanelOps


@pytest.fixture(scope="module")
def parts() -> Iterator[Parts]:
    try:
        library = Library(kernels_library())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    pool = Pool(library, THREADS)
    runner = Runner(pool)
    ops = PanelOps(library, runner, THREADS)
    yield Parts(library, runner, ops)
    ops.close()
    pool.close()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_like(library: Library, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """``weight`` and ``x`` as the kernels see them, in float64, and the tolerance left."""
    rounds = library.instructions == "AVX512-BF16" and weight.dtype == torch.bfloat16
    seen = x.bfloat16().double() if rounds else x.double()
    return weight.double(), seen, 2e-6 * weight.shape[1] ** 0.5 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [1, 15, 16, 37, 96])
@pytest.mark.parametrize("depth", [2, 7, 64, 515, 1030])
def test_linear(parts: Parts, dtype: torch.dtype, out: int, depth: int) -> None:
    weight, bias = random(out, depth).to(dtype), random(out, seed=1)
    packed = parts.ops.prepare_linear(weight.clone(), bias)
    assert (packed.out_features, packed.in_features) == (out, depth)
    for rows in (*range(1, 14), 23, 70, 72, 73, 150):
        x = random(rows, depth, seed=rows)
        wide, seen, tolerance = weight_like(parts.library, weight, x)
        got = parts.ops.linear(x, packed)
        torch.testing.assert_close(got.double(), F.linear(seen, wide, bias.double()), rtol=1e-5, atol=10 * tolerance)


def test_linear_without_bias_is_not_given_another_one(parts: Parts) -> None:
    weight, x = random(33, 20), random(4, 20, seed=2)
    torch.testing.assert_close(parts.ops.linear(x, parts.ops.prepare_linear(weight.clone())), x @ weight.T)


def test_a_rows_result_does_not_depend_on_its_neighbours(parts: Parts) -> None:
    packed = parts.ops.prepare_linear(random(48, 600).bfloat16())
    x = random(40, 600, seed=3)
    alone = torch.cat([parts.ops.linear(x[row : row + 1].contiguous(), packed) for row in range(len(x))])
    assert torch.equal(parts.ops.linear(x, packed), alone)


def test_a_nan_stays_in_its_row(parts: Parts) -> None:
    packed = parts.ops.prepare_linear(random(33, 21).bfloat16())
    x = random(9, 21)
    x[4] = float("nan")
    broken = parts.ops.linear(x, packed).isnan().any(dim=1)
    assert broken.tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "hidden", "scale"), [(40, 12, 1.0), (33, 7, 3.7)])
def test_embedding_reads_the_head_it_is_tied_to(
    parts: Parts, dtype: torch.dtype, vocab: int, hidden: int, scale: float
) -> None:
    weight = random(vocab, hidden).to(dtype)
    table, head = parts.ops.prepare_embedding(weight.clone())
    ids = torch.tensor([0, vocab - 1, 5, 5, 17], dtype=torch.int32)
    factor = torch.tensor(scale, dtype=dtype).float()
    torch.testing.assert_close(parts.ops.embed(ids, table, scale), weight.float()[ids] * factor, rtol=0, atol=0)
    assert head.out_features == vocab


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("width", [1, 8, 33, 576])
def test_norms_and_sums(parts: Parts, rows: int, width: int) -> None:
    x, residual, weight = random(rows, width), random(rows, width, seed=1), random(width, seed=2)
    torch.testing.assert_close(parts.ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    wanted = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(parts.ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5), wanted)
    torch.testing.assert_close(parts.ops.add(x.clone(), residual.clone()), x + residual)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [1, 16, 45])
def test_gated_activation(parts: Parts, activation: str, inner: int) -> None:
    x = random(7, 2 * inner) * 8
    x[0, 0], x[1, 0] = -120.0, 120.0
    torch.testing.assert_close(
        parts.ops.gated_activation(x, activation), REFERENCE.gated_activation(x, activation), rtol=3e-6, atol=2e-6
    )


def test_take_rows_and_logits(parts: Parts) -> None:
    x, index = random(12, 40), torch.tensor([11, 0, 3], dtype=torch.int32)
    assert torch.equal(parts.ops.take_rows(x, index), x[index])
    head = parts.ops.prepare_linear(random(50, 40, seed=1))
    wanted = REFERENCE.logits(x, REFERENCE.prepare_linear(random(50, 40, seed=1)), 5.0)
    torch.testing.assert_close(parts.ops.logits(x, head, 5.0), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k", "inner", "rows"), [(4, 2, 24, 1), (8, 3, 32, 9), (5, 1, 16, 200)])
def test_experts(
    parts: Parts, dtype: torch.dtype, renormalize: bool, experts: int, top_k: int, inner: int, rows: int
) -> None:
    hidden = 20
    gate_up, down = random(experts, 2 * inner, hidden).to(dtype), random(experts, hidden, inner, seed=1).to(dtype)
    x, router = random(rows, hidden, seed=2), random(rows, experts, seed=3)
    made = parts.ops.experts(
        x,
        router,
        parts.ops.prepare_experts(gate_up.clone(), down.clone()),
        top_k=top_k,
        renormalize=renormalize,
        activation="silu",
    )
    wanted = REFERENCE.experts(
        x,
        router,
        REFERENCE.prepare_experts(gate_up.float(), down.float()),
        top_k=top_k,
        renormalize=renormalize,
        activation="silu",
    )
    loose = dtype == torch.bfloat16 and parts.library.instructions == "AVX512-BF16"
    tolerance = {"rtol": 0.05, "atol": 0.5} if loose else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(made, wanted, **tolerance)


@pytest.mark.parametrize("width", [1, 7, 64, 1003])
def test_argmax_takes_the_lowest_of_equals_and_tells_bad_rows(parts: Parts, width: int) -> None:
    logits = random(6, width)
    logits[1, width // 2 :] = 9.0
    logits[2, width - 1] = float("nan")
    logits[3] = float("-inf")
    logits[4, 0] = float("inf")
    tokens, invalid = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.bool)
    parts.runner.run(Kind.ARGMAX, logits, (logits, tokens, invalid), (width,))
    assert invalid.tolist() == [False, False, True, True, True, False]
    good = [0, 1, 5]
    assert tokens[good].tolist() == logits[good].argmax(dim=1).tolist()
    assert tokens[1] == width // 2 and tokens[2] == 0


def test_other_dtypes_are_refused(parts: Parts) -> None:
    with pytest.raises(Unsupported, match="float16"):
        parts.ops.prepare_linear(random(4, 4).half())


@pytest.mark.parametrize("value", [0.1, -3.3, 1.0, 25.298, 1e-20])
def test_rounding_to_bfloat16(value: float) -> None:
    assert round_to_bfloat16(value) == float(torch.tensor(value, dtype=torch.bfloat16))
