"""Every operation of a layer over ragged shapes, each dtype declared, and sizes that fill no tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.golden import activate, random, require_close, rms_norm

pytestmark = [pytest.mark.requires_parts]

DTYPES = ["float32", "bfloat16", "float16"]
TOKENS = (1, 2, 3, 7, 16, 33, 130)
EPSILON = 1e-5


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, isthmus_device: DeviceUnderTest) -> str:
    """Each dtype that the backend declares for weights."""
    if isthmus_device.has_parts and request.param not in isthmus_device.capabilities.dtypes:
        pytest.skip(f"undeclared: dtypes={request.param}")
    return str(request.param)


class Case:
    """Calls one operation as the decoder does, for every number of tokens."""

    def __init__(self, device: DeviceUnderTest, dtype: str) -> None:
        self.device = device
        self.ops = device.parts.ops
        self.weight_dtype: torch.dtype = getattr(torch, dtype)
        self.hidden_dtype = device.hidden_dtype(dtype)
        self.counts = device.token_counts(*TOKENS)

    def weight(self, *shape: int, seed: int = 1) -> Tensor:
        return random(*shape, dtype=self.weight_dtype, seed=seed, scale=shape[-1] ** -0.5)

    def hidden(self, *shape: int, seed: int = 2) -> Tensor:
        # Rounded to the weights' dtype, so that a backend that computes more finely has the same numbers.
        return random(*shape, dtype=self.weight_dtype, seed=seed).to(self.hidden_dtype)

    def norm(self, size: int, seed: int = 3) -> Tensor:
        return 1 + 0.1 * random(size, dtype=torch.float32, seed=seed)


@pytest.fixture
def case(isthmus_device: DeviceUnderTest, dtype: str) -> Case:
    return Case(isthmus_device, dtype)


def test_some_dtype_is_declared(isthmus_device: DeviceUnderTest) -> None:
    assert set(isthmus_device.capabilities.dtypes) & set(DTYPES)


@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (96, 40), (160, 64), (576, 131)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear(case: Case, dtype: str, inner: int, outer: int, bias: bool) -> None:
    weight, offset = case.weight(outer, inner), case.weight(1, outer, seed=9)[0] if bias else None
    device = case.device
    prepared = device.run(
        lambda: case.ops.prepare_linear(device.put(weight), None if offset is None else device.put(offset))
    )
    assert (prepared.out_features, prepared.in_features) == (outer, inner)
    for count in case.counts:
        x = case.hidden(count, inner)
        y = device.run(lambda x=x: case.ops.linear(device.put(x), prepared))  # type: ignore[misc]
        expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        require_close(y, expected, dtype, f"linear of {count} tokens, {inner} to {outer}")
        assert y.dtype == case.hidden_dtype


@pytest.mark.parametrize("vocab", [64, 131, 1000])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_logits_are_float32(case: Case, dtype: str, vocab: int, softcap: float) -> None:
    device, weight = case.device, case.weight(vocab, 96) * 20
    table, head = device.run(lambda: case.ops.prepare_embedding(device.put(weight)))
    for count in case.counts[:5]:
        x = case.hidden(count, 96)
        logits = device.run(lambda x=x: case.ops.logits(device.put(x), head, softcap))  # type: ignore[misc]
        expected = x.double() @ weight.double().T
        if softcap:
            expected = softcap * torch.tanh(expected / softcap)
        assert logits.dtype == torch.float32
        require_close(logits, expected, dtype, f"logits of {count} rows over {vocab} tokens")
    embedded = device.run(lambda: case.ops.embed(device.put(torch.zeros(case.counts[0], dtype=torch.int32)), table, 1))
    require_close(embedded, weight[:1].double().expand(case.counts[0], -1), dtype, "the tied table's first row")


@pytest.mark.parametrize("scale", [1.0, 9.797959])
def test_embed(case: Case, dtype: str, scale: float) -> None:
    device, weight = case.device, case.weight(131, 96)
    table = device.run(lambda: case.ops.prepare_table(device.put(weight)))
    for count in case.counts:
        ids = (torch.arange(count) * 7919 % 131).int()
        hidden = device.run(lambda ids=ids: case.ops.embed(device.put(ids), table, scale))  # type: ignore[misc]
        require_close(hidden, weight.double()[ids.long()] * scale, dtype, f"embedding of {count} tokens")


@pytest.mark.parametrize("size", [64, 96, 576])
def test_norms(case: Case, dtype: str, size: int) -> None:
    device, weight = case.device, case.norm(size)
    prepared = device.run(lambda: case.ops.prepare_norm(device.put(weight)))
    require_close(prepared, weight.double(), "float32", "a prepared norm")
    assert prepared.dtype == torch.float32
    for count in case.counts:
        x, residual = case.hidden(count, size), case.hidden(count, size, seed=5)
        y = device.run(lambda x=x: case.ops.rms_norm(device.put(x), prepared, EPSILON))  # type: ignore[misc]
        require_close(y, rms_norm(x, weight, EPSILON), dtype, f"rms_norm of {count} x {size}")
        total = x.double() + residual.double()
        y, added = device.run(
            lambda x=x, residual=residual: case.ops.add_rms_norm(  # type: ignore[misc]
                device.put(x), device.put(residual), prepared, EPSILON
            )
        )
        require_close(added, total, dtype, f"the sum of add_rms_norm of {count} x {size}")
        require_close(y, rms_norm(total, weight, EPSILON), dtype, f"add_rms_norm of {count} x {size}")
        both = device.run(
            lambda x=x, residual=residual: case.ops.add(device.put(x), device.put(residual))  # type: ignore[misc]
        )
        require_close(both, total, dtype, f"add of {count} x {size}")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [48, 72, 160])
def test_gated_activation(case: Case, dtype: str, activation: str, inner: int) -> None:
    device = case.device
    for count in case.counts:
        x = case.hidden(count, 2 * inner) * 3
        y = device.run(lambda x=x: case.ops.gated_activation(device.put(x), activation))  # type: ignore[misc]
        gate, up = x.chunk(2, -1)
        require_close(y, activate(gate, activation) * up.double(), dtype, f"{activation} of {count} x {inner}")


def test_take_rows(case: Case, dtype: str) -> None:
    x = case.hidden(case.counts[-1], 96)
    device = case.device
    for count in (n for n in case.counts if n <= 33):
        index = (torch.arange(count) * 7919 % len(x)).int()
        y = device.run(lambda index=index: case.ops.take_rows(device.put(x), device.put(index)))  # type: ignore[misc]
        require_close(y, x.double()[index.long()], dtype, f"{count} rows of {len(x)}")


@pytest.mark.requires_capability("experts")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("renormalize", [False, True], ids=["as is", "renormalized"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts(case: Case, dtype: str, top_k: int, renormalize: bool, activation: str) -> None:
    num_experts, hidden, inner = 6, 64, 40
    gate_up, down = case.weight(num_experts, 2 * inner, hidden), case.weight(num_experts, hidden, inner, seed=4)
    device = case.device
    prepared = device.run(lambda: case.ops.prepare_experts(device.put(gate_up), device.put(down)))
    for count in case.counts:
        x, router = case.hidden(count, hidden), distinct(count, num_experts).to(case.hidden_dtype)
        mixed = device.run(
            lambda x=x, router=router: case.ops.experts(  # type: ignore[misc]
                device.put(x),
                device.put(router),
                prepared,
                top_k=top_k,
                renormalize=renormalize,
                activation=activation,
            )
        )
        share, chosen = torch.softmax(router.double(), -1).topk(top_k, -1)
        if renormalize:
            share = share / share.sum(-1, keepdim=True)
        expected = torch.zeros(count, hidden, dtype=torch.float64)
        for token in range(count):
            for weight, expert in zip(share[token], chosen[token].tolist(), strict=True):
                gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
                expected[token] += weight * (down[expert].double() @ (activate(gate, activation) * up))
        require_close(mixed, expected, dtype, f"{top_k} of {num_experts} experts over {count} tokens")


def distinct(rows: int, columns: int) -> Tensor:
    """Halves in a random order, so that no two are equal in any dtype."""
    return random(rows, columns, seed=6).argsort(-1).float() / 2
