"""Reference ops, inputs, memory and backend against straightforward torch."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from isthmus.contract import Attention, Backend, Graphs, Limits, LinearWeight, Ops, Sampling, StepShape
from isthmus.errors import Unsupported
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import (
    ReferenceBackend,
    ReferenceCollectives,
    ReferenceGraphs,
    ReferenceInputs,
    ReferenceMemory,
    ReferenceOps,
)
from isthmus.reference.memory import host_available_bytes, host_total_bytes
from isthmus.sampling_params import RowSampling

CPU = torch.device("cpu")
OPS = ReferenceOps(CPU)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_logits(dtype: torch.dtype) -> None:
    x, weight, bias = randn(5, 8, dtype=dtype), randn(12, 8, seed=1, dtype=dtype), randn(12, seed=2)
    prepared = OPS.prepare_linear(weight, bias)
    assert (prepared.in_features, prepared.out_features) == (8, 12)
    expected = x.double() @ weight.double().T + bias.to(dtype).double()
    out = OPS.linear(x, prepared)
    assert out.dtype == dtype
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    logits = OPS.logits(x, prepared, 3.0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 3 * torch.tanh(expected / 3), rtol=tolerance, atol=tolerance)


def test_tied_embedding() -> None:
    table, head = OPS.prepare_embedding(randn(20, 6))
    ids = torch.tensor([3, 19, 3], dtype=torch.int32)
    assert torch.equal(OPS.embed(ids, table, 1.0), table[[3, 19, 3]])
    assert torch.equal(OPS.embed(ids, table, 2.0), 2 * table[[3, 19, 3]])
    torch.testing.assert_close(OPS.logits(table[:2], head, 0.0), table[:2] @ table.T)


def test_embedding_scale_is_rounded_to_the_compute_dtype() -> None:
    table = OPS.prepare_table(randn(4, 6, dtype=torch.bfloat16))
    scaled = OPS.embed(torch.tensor([1], dtype=torch.int32), table, 3072**0.5)
    assert torch.equal(scaled, table[[1]] * torch.tensor(55.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    x, residual, weight = randn(3, 16, dtype=dtype), randn(3, 16, seed=1, dtype=dtype), randn(16, seed=2)
    prepared = OPS.prepare_norm(weight.to(dtype))
    assert prepared.dtype == torch.float32
    total = residual + x
    normed, kept = OPS.add_rms_norm(x.clone(), residual.clone(), prepared, 1e-3)
    assert torch.equal(kept, total) and torch.equal(OPS.add(x, residual), total)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * prepared.double()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(OPS.rms_norm(total, prepared, 1e-3), normed)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(activation: str) -> None:
    gate_up = randn(4, 10)
    gate, up = gate_up[:, :5].double(), gate_up[:, 5:].double()
    inner = 0.7978845608028654 * (gate + 0.044715 * gate**3)
    act = gate * torch.sigmoid(gate) if activation == "silu" else 0.5 * gate * (1 + torch.tanh(inner))
    torch.testing.assert_close(OPS.gated_activation(gate_up, activation).double(), act * up, rtol=1e-5, atol=1e-6)


def test_take_rows() -> None:
    x = randn(6, 3)
    assert torch.equal(OPS.take_rows(x, torch.tensor([5, 0, 5], dtype=torch.int32)), x[[5, 0, 5]])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_experts_equal_a_loop_over_tokens(renormalize: bool, top_k: int) -> None:
    x, gate_up, down = randn(9, 8), randn(6, 10, 8, seed=1), randn(6, 8, 5, seed=2)
    router = randn(9, 6, seed=3)
    router[:, 2] -= 100  # an expert that nobody chooses, unless all are
    weights = OPS.prepare_experts(gate_up, down)
    out = OPS.experts(x, router, weights, top_k=top_k, renormalize=renormalize, activation="silu")
    for token in range(9):
        share = torch.softmax(router[token].double(), 0)
        chosen = sorted(range(6), key=lambda e: -float(share[e]))[:top_k]
        total = sum(share[e] for e in chosen) if renormalize else 1.0
        expected = torch.zeros(8, dtype=torch.float64)
        for e in chosen:
            inner = gate_up[e].double() @ x[token].double()
            gated = inner[:5] * torch.sigmoid(inner[:5]) * inner[5:]
            expected += share[e] / total * (down[e].double() @ gated)
        torch.testing.assert_close(out[token].double(), expected, rtol=1e-4, atol=1e-4)


LIMITS = Limits(max_rows=3, max_tokens=16, max_model_len=20, block_size=4, num_blocks=20, vocab_size=50)


def plan(
    spans: list[tuple[int, int, int, bool]],
    starts: dict[int, list[int]] | None = None,
    blocks: list[tuple[int, int, int]] = (),  # type: ignore[assignment]
) -> StepPlan:
    rows, begins, lengths, samples = zip(*spans, strict=True)
    columns = np.array(blocks, np.int32).reshape(-1, 3).T
    return StepPlan(
        step=0,
        starts=tuple(
            RowStart(
                row=row,
                tokens=np.array(tokens, np.int32),
                num_prompt_tokens=len(tokens),
                sampling=RowSampling(max_tokens=1),
            )
            for row, tokens in (starts or {}).items()
        ),
        block_rows=columns[0],
        block_indices=columns[1],
        block_ids=columns[2],
        span_rows=np.array(rows, np.int32),
        span_starts=np.array(begins, np.int32),
        span_lengths=np.array(lengths, np.int32),
        span_samples=np.array(samples, np.bool_),
    )


def test_inputs_of_mixed_spans() -> None:
    part = ReferenceInputs(CPU)
    device = part.allocate(LIMITS)
    first = plan(
        [(2, 0, 5, True), (0, 0, 3, False)],
        {2: [10, 11, 12, 13, 14], 0: [20, 21, 22, 23]},
        [(2, 0, 7), (0, 0, 5), (2, 1, 9)],
    )
    part.upload(first, device)
    inputs = part.build(device, StepShape(8, 2, 1))
    assert inputs.token_ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 22]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert inputs.slots.tolist() == [28, 29, 30, 31, 36, 20, 21, 22]
    assert inputs.span_rows.tolist() == [2, 0]
    assert inputs.query_starts.tolist() == [0, 5, 8]
    assert inputs.context_lengths.tolist() == [5, 3]
    assert (inputs.sample_tokens.tolist(), inputs.sample_rows.tolist()) == ([4], [2])
    assert (inputs.max_query_length, inputs.max_context_length) == (5, 5)
    assert device.num_prompt_tokens.tolist() == [4, 0, 5, 0]
    assert device.block_tables[:, :2].tolist() == [[5, 0], [0, 0], [7, 9], [0, 0]]

    # The next step knows row 2's token only from the device, and only when the inputs are built.
    part.upload(plan([(0, 3, 1, True), (2, 5, 1, True)]), device)
    device.tokens[2, 5] = 42
    later = part.build(device, StepShape(4, 3, 3))
    assert later.token_ids.tolist() == [23, 42, 0, 0]
    assert later.slots.tolist() == [23, 37, 0, 0]
    assert later.query_starts.tolist() == [0, 1, 2, 2]
    assert later.context_lengths.tolist() == [4, 6, 0]
    assert later.sample_rows.tolist() == [0, 2, 3]
    assert later.token_ids.data_ptr() == inputs.token_ids.data_ptr()
    assert later.slots.data_ptr() == inputs.slots.data_ptr()


def test_a_start_voids_what_the_row_held() -> None:
    part = ReferenceInputs(CPU)
    device = part.allocate(LIMITS)
    part.upload(plan([(1, 0, 5, True)], {1: [1] * 5}, [(1, 0, 8), (1, 1, 6)]), device)
    part.upload(plan([(1, 0, 2, True)], {1: [2] * 2}, [(1, 0, 3)]), device)
    assert device.block_tables[1, :3].tolist() == [3, 0, 0]
    assert part.build(device, StepShape(2, 1, 1)).slots.tolist() == [12, 13]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_memory_runs_steps_in_order(asynchronous: bool) -> None:
    memory = ReferenceMemory(CPU, asynchronous=asynchronous)
    done: list[int] = []
    threads: set[str] = set()

    def step(number: int) -> int:
        time.sleep(0.002 if number == 0 else 0)
        threads.add(threading.current_thread().name)
        done.append(number)
        if number == 1:
            raise ValueError("only this one")
        return number

    pending = [memory.launch(lambda n=n: step(n)) for n in range(4)]  # type: ignore[misc]
    memory.synchronize()
    assert done == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="only this one"):
        pending[1].result()
    assert [pending[n].result() for n in (0, 2, 3)] == [0, 2, 3]
    assert len(threads) == 1 and (threading.current_thread().name in threads) is not asynchronous
    memory.close()


def test_launching_does_not_wait_for_a_worker() -> None:
    memory = ReferenceMemory(CPU, asynchronous=True)
    gate = threading.Event()
    pending = memory.launch(lambda: gate.wait(5))
    gate.set()  # reached only if launch returned while the step waited
    assert pending.result() is True
    memory.close()


def test_fetch_is_a_copy() -> None:
    source = torch.arange(3, dtype=torch.int32)
    (fetched,) = ReferenceMemory(CPU).fetch([source]).result()
    source.zero_()
    assert fetched.tolist() == [0, 1, 2]


def test_host_memory_is_told() -> None:
    assert 2**20 < host_available_bytes() <= host_total_bytes()
    memory = ReferenceMemory(CPU)
    assert memory.total_bytes() == host_total_bytes() and memory.available_bytes() > 0


def test_the_backend_keeps_its_contract() -> None:
    backend = ReferenceBackend(name="pretend")
    assert isinstance(backend, Backend)
    parts: tuple[Attention | Ops | Sampling | Graphs, ...]  # mypy compares each part with its protocol
    parts = (backend.attention, backend.ops, backend.sampling, backend.graphs)
    assert all(part is not None for part in parts)
    assert backend.device.backend == "pretend" and backend.collectives.world_size == 1
    assert backend.providers()["inputs"] == "ReferenceInputs"
    own = ReferenceOps(CPU)
    assert ReferenceBackend(ops=own).ops is own
    weight: LinearWeight = own.prepare_linear(randn(2, 3))
    assert weight.out_features == 2


def test_without_graphs_and_alone() -> None:
    with pytest.raises(Unsupported, match="eagerly"):
        ReferenceGraphs().capture(lambda: None, 1)
    x = randn(2)
    assert torch.equal(ReferenceCollectives().all_reduce(x), x)
