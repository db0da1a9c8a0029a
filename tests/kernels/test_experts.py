"""Mixtures of experts against the torch reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from isthmus.reference import ReferenceOps
from isthmus_triton.ahead import CompileAhead, Launch, listing
from isthmus_triton.kernels.experts import (
    expert_launch_for,
    expert_linear_kernel,
    route,
    row_tiles_of,
)
from isthmus_triton.launch import launch_table
from isthmus_triton.ops import TritonOps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@dataclass(frozen=True)
class Mixture:
    """Inputs whose results are near one."""

    x: Tensor
    router: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int = 2
    renormalize: bool = False
    activation: str = "silu"

    def mix(self, ops: ReferenceOps) -> Tensor:
        return ops.experts(
            self.x,
            self.router,
            ops.prepare_experts(self.gate_up, self.down),
            top_k=self.top_k,
            renormalize=self.renormalize,
            activation=self.activation,
        )

    def check(self, ours: Tensor) -> None:
        """Against float32 throughout, so that roundings of the reference's own do not count."""
        dtype = self.x.dtype
        wide = replace(self, x=self.x.float(), gate_up=self.gate_up.float(), down=self.down.float())
        assert ours.dtype == dtype
        assert ours.shape == self.x.shape
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours.float(), wide.mix(ReferenceOps(self.x.device)), atol=tolerance, rtol=tolerance)


def mixture(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = 5,
    experts: int = 6,
    hidden: int = 72,
    inner: int = 40,
) -> Mixture:
    return Mixture(
        x=random(device, dtype, tokens, hidden),
        router=2 * random(device, dtype, tokens, experts, seed=1),
        gate_up=random(device, torch.float32, experts, 2 * inner, hidden, seed=2).mul(hidden**-0.5).to(dtype),
        down=random(device, torch.float32, experts, hidden, inner, seed=3).mul(inner**-0.5).to(dtype),
    )


@pytest.fixture
def ours(device: torch.device, arch: str) -> TritonOps:
    return TritonOps(device, launch_table(arch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_experts(
    ours: TritonOps, device: torch.device, dtype: torch.dtype, top_k: int, renormalize: bool, activation: str
) -> None:
    case = replace(mixture(device, dtype), top_k=top_k, renormalize=renormalize, activation=activation)
    case.check(case.mix(ours))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("experts", "hidden", "inner"), [(8, 64, 64), (6, 33, 17), (1, 130, 70), (130, 24, 8)])
def test_odd_sizes(ours: TritonOps, device: torch.device, tokens: int, experts: int, hidden: int, inner: int) -> None:
    case = mixture(device, tokens=tokens, experts=experts, hidden=hidden, inner=inner)
    case = replace(case, top_k=min(3, experts))
    case.check(case.mix(ours))


def test_no_tokens(ours: TritonOps, device: torch.device) -> None:
    assert mixture(device, torch.float16, tokens=0).mix(ours).shape == (0, 72)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [23, 90, 250])
def test_several_tiles_of_an_expert_and_none_of_another(
    ours: TritonOps, device: torch.device, arch: str, dtype: torch.dtype, tokens: int
) -> None:
    case = mixture(device, dtype, tokens=tokens, hidden=72, inner=136)
    case.router[:, 1] += 20
    case.router[:, 4] -= 100
    launches = launch_table(arch).experts_in(dtype.itemsize)
    assert expert_launch_for(2 * tokens, 6, launches).row_tile < tokens
    case.check(case.mix(ours))


@pytest.mark.parametrize("tokens", [40, 150])
def test_all_tokens_to_one_expert(ours: TritonOps, device: torch.device, tokens: int) -> None:
    case = replace(mixture(device, tokens=tokens), top_k=1)
    case.router[:] = 0
    case.router[:, 5] = 30
    case.check(case.mix(ours))


# The interpreter's, which computes with numpy.
@pytest.mark.filterwarnings("ignore:(invalid|divide|overflow).*:RuntimeWarning")
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_row_that_is_not_numbers_spoils_no_other(ours: TritonOps, device: torch.device, renormalize: bool) -> None:
    case = replace(mixture(device, tokens=7), top_k=3, renormalize=renormalize)
    expected = case.mix(ours)
    for row, value in ((1, float("nan")), (3, float("inf")), (4, float("-inf"))):
        case.router[row] = value
    case.router[5, 2] = float("nan")
    mixed = case.mix(ours)
    torch.testing.assert_close(mixed[[0, 2, 6]], expected[[0, 2, 6]], atol=0, rtol=0)
    assert not mixed[[1, 3, 4, 5]].isfinite().any()


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 512, 16), (37, 60, 4), (9, 6, 6), (3, 1, 1)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing(device: torch.device, tokens: int, experts: int, top_k: int, renormalize: bool) -> None:
    # Halves in a random order: no two are equal.
    logits = random(device, torch.float32, tokens, experts).argsort(-1).bfloat16() / 2
    if experts > 256:  # which bf16 does not tell apart
        logits = random(device, torch.float32, tokens, experts)
    routing = route(logits, top_k, renormalize=renormalize)
    shares, chosen = torch.softmax(logits.float(), -1).topk(top_k, -1)
    if renormalize:
        shares = shares / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.shares, shares, atol=1e-6, rtol=1e-5)
    pairs: list[list[int]] = [[] for _ in range(experts)]
    for pair, expert in enumerate(chosen.flatten().tolist()):
        pairs[expert].append(pair)
    assert routing.counts.tolist() == [len(of_one) for of_one in pairs]
    filled = [sorted(routing.lists[expert, : len(of_one)].tolist()) for expert, of_one in enumerate(pairs)]
    assert filled == pairs


def test_equal_logits_choose_the_first_experts(device: torch.device) -> None:
    routing = route(torch.zeros(2, 6, device=device), 3, renormalize=False)
    assert routing.counts.tolist() == [2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("row_tile", [2, 3])
def test_grid_holds_every_routing(row_tile: int) -> None:
    """Against every way of dealing up to 7 pairs to 3 experts: the bound is never passed, and is met."""
    for pairs in range(1, 8):
        fills = [
            sum(-(-count // row_tile) for count in (first, second, pairs - first - second))
            for first in range(pairs + 1)
            for second in range(pairs + 1 - first)
        ]
        assert max(fills) == row_tiles_of(pairs, 3, row_tile)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4, 300])
def test_capture(ours: TritonOps, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    if device.type == "cpu":
        pytest.skip("kernels are interpreted")
    case = replace(mixture(device, dtype, tokens=tokens), renormalize=True)
    case.mix(ours)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = case.mix(ours)
    for seed in (7, 8):
        case.x.copy_(random(device, dtype, *case.x.shape, seed=seed))
        case.router.copy_(2 * random(device, dtype, *case.router.shape, seed=seed + 10))
        graph.replay()
        case.check(mixed)


class Recorder(CompileAhead):
    """Remembers what it is asked to compile."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.launches: list[Launch] = []

    @property
    def active(self) -> bool:
        return True

    def begin(self, launches: Sequence[Launch]) -> None:
        self.launches += launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_compiled_ahead(device: torch.device, arch: str, dtype: torch.dtype) -> None:
    ahead = Recorder(device)
    ops = TritonOps(device, launch_table(arch), ahead=ahead)
    for tokens in (1, 90, 700):
        with listing() as launches:
            mixture(device, dtype, tokens=tokens).mix(ops)
        products = [launch for launch in launches if launch.kernel is expert_linear_kernel]
        assert len(products) == 2
        for product in products:
            assert product.options in [launch.options for launch in ahead.launches]
    assert len(ahead.launches) == 3 * 2 * len(launch_table(arch).experts_in(dtype.itemsize))
