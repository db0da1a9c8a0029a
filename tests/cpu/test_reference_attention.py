"""Paged attention against a dense implementation written the slow, plain way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepShape
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import PagedCache, ReferenceAttention, ReferenceInputs
from isthmus.sampling_params import RowSampling

CPU = torch.device("cpu")
ROWS, MAX_LEN, SIZE = 8, 700, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def limits(block_size: int = SIZE) -> Limits:
    return Limits(
        max_rows=ROWS,
        max_tokens=1024,
        max_model_len=MAX_LEN,
        block_size=block_size,
        num_blocks=1 + ROWS * -(-MAX_LEN // block_size),
        vocab_size=50,
    )


def spans_plan(spans: list[tuple[int, int, int]], tables: dict[int, list[int]]) -> StepPlan:
    """A plan whose rows start with these block tables; spans are (row, start, length)."""
    rows = [row for row, _, _ in spans]
    return StepPlan(
        step=0,
        starts=tuple(
            RowStart(
                row=row,
                tokens=np.zeros(start + length, np.int32),
                num_prompt_tokens=1,
                sampling=RowSampling(max_tokens=1),
            )
            for row, start, length in spans
        ),
        block_rows=np.array([row for row in rows for _ in tables[row]], np.int32),
        block_indices=np.array([i for row in rows for i in range(len(tables[row]))], np.int32),
        block_ids=np.array([block for row in rows for block in tables[row]], np.int32),
        span_rows=np.array(rows, np.int32),
        span_starts=np.array([start for _, start, _ in spans], np.int32),
        span_lengths=np.array([length for _, _, length in spans], np.int32),
        span_samples=np.ones(len(spans), np.bool_),
    )


def dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, layer: AttentionSpec
) -> torch.Tensor:
    """One span, a query and a head at a time, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for index in range(query.shape[0]):
        position = start + index
        low = max(0, position - layer.window + 1) if layer.window else 0
        for head in range(layer.heads):
            kv = head // (layer.heads // layer.kv_heads)
            scores = keys[low : position + 1, kv].double() @ query[index, head].double() * layer.scale
            if layer.softcap:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            out[index, head] = torch.softmax(scores, 0) @ values[low : position + 1, kv].double()
    return out.flatten(1)


def random_tables(rng: np.random.Generator, contexts: dict[int, int], block_size: int) -> dict[int, list[int]]:
    blocks = list(rng.permutation(np.arange(1, limits(block_size).num_blocks)))
    return {row: [int(blocks.pop()) for _ in range(-(-context // block_size))] for row, context in contexts.items()}


SPANS = {
    "decode": [(r, 5 + 37 * r, 1) for r in range(ROWS)],
    "first token": [(3, 0, 1)],
    "prefill": [(0, 0, 13), (5, 0, 4)],
    "long prefill": [(2, 0, 600)],
    "chunk": [(1, 9, 300)],
    "mixed": [(4, 0, 7), (2, 33, 1), (7, 12, 5), (0, 0, 1), (6, 401, 1)],
}
LAYERS = {
    "plain": AttentionSpec(heads=4, kv_heads=4, head_dim=8, scale=8**-0.5),
    "grouped": AttentionSpec(heads=6, kv_heads=2, head_dim=16, scale=0.3),
    "window": AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=8**-0.5, window=11),
    "softcap": AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=1.0, softcap=2.0),
    "both": AttentionSpec(heads=4, kv_heads=1, head_dim=8, scale=1.0, window=6, softcap=1.5),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_attend_equals_dense(spans: list[tuple[int, int, int]], layer: AttentionSpec) -> None:
    rng = np.random.default_rng(1)
    generator = torch.Generator().manual_seed(1)
    attention, inputs_part = ReferenceAttention(CPU), ReferenceInputs(CPU)
    state = inputs_part.allocate(limits())
    (cache,) = attention.allocate([layer], limits(), "float32")
    assert isinstance(cache, PagedCache)
    cache.keys.fill_(math.nan)  # a stale place that leaks into an output shows
    cache.values.fill_(math.nan)

    contexts = {row: start + length for row, start, length in spans}
    tables = random_tables(rng, contexts, SIZE)
    keys, values = {}, {}
    for row, context in contexts.items():
        keys[row], values[row] = torch.randn(2, context, layer.kv_heads, layer.head_dim, generator=generator)
        for position in range(context):
            place = tables[row][position // SIZE], position % SIZE
            cache.keys[place], cache.values[place] = keys[row][position], values[row][position]

    inputs_part.upload(spans_plan(spans, tables), state)
    tokens = sum(length for _, _, length in spans)
    inputs = inputs_part.build(state, StepShape(tokens, len(spans), len(spans)))
    query = torch.randn(tokens, layer.heads, layer.head_dim, generator=generator)
    out = attention.attend(query, cache, layer, attention.plan(inputs), inputs)

    begin = 0
    for row, start, length in spans:
        expected = dense(query[begin : begin + length], keys[row], values[row], start, layer)
        torch.testing.assert_close(out[begin : begin + length].double(), expected, rtol=1e-4, atol=1e-5)
        begin += length


def test_shared_blocks_and_padding() -> None:
    """Two rows on one prefix see the same keys; padded tokens give finite rows and disturb nobody."""
    layer = LAYERS["grouped"]
    attention, inputs_part = ReferenceAttention(CPU), ReferenceInputs(CPU)
    state = inputs_part.allocate(limits())
    (cache,) = attention.allocate([layer], limits(), "float32")
    generator = torch.Generator().manual_seed(2)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
    tables = {0: [7, 9, 3], 1: [7, 9, 3]}
    inputs_part.upload(spans_plan([(0, 10, 1), (1, 10, 1)], tables), state)
    query = torch.randn(1, layer.heads, layer.head_dim, generator=generator).repeat(6, 1, 1)

    exact = inputs_part.build(state, StepShape(2, 2, 2))
    out = attention.attend(query[:2], cache, layer, attention.plan(exact), exact)
    assert torch.equal(out[0], out[1])

    padded = inputs_part.build(state, StepShape(6, 4, 4))
    assert padded.slots[2:].tolist() == [0] * 4
    assert padded.span_rows[2:].tolist() == [ROWS] * 2
    padded_out = attention.attend(query, cache, layer, attention.plan(padded), padded)
    assert torch.equal(padded_out[:2], out)
    assert torch.isfinite(padded_out).all()


@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store(rotary_dim: int, normed: bool) -> None:
    layer = LAYERS["grouped"]
    attention, inputs_part = ReferenceAttention(CPU), ReferenceInputs(CPU)
    state = inputs_part.allocate(limits())
    (cache,) = attention.allocate([layer], limits(), "float32")
    spans, tables = [(2, 6, 5), (4, 0, 1)], {2: [11, 8, 5], 4: [2]}
    inputs_part.upload(spans_plan(spans, tables), state)
    inputs = inputs_part.build(state, StepShape(6, 2, 2))

    generator = torch.Generator().manual_seed(3)
    angles = torch.randn(MAX_LEN, rotary_dim // 2, generator=generator)
    rotary = RotarySpec(cos_sin=torch.cat((angles.cos(), angles.sin()), -1), rotary_dim=rotary_dim)
    norm = QkNorm(query_weight=torch.rand(16), key_weight=torch.rand(16), epsilon=1e-3) if normed else None
    qkv = torch.randn(6, 10 * 16, generator=generator)
    query = attention.rotate_and_store(qkv.clone(), cache, layer, rotary, norm, inputs)

    def expected(head: torch.Tensor, position: int, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            head = head / (head.square().mean() + 1e-3).sqrt() * weight
        out, half = head.clone(), rotary_dim // 2
        for i in range(half):
            turn = complex(float(angles[position, i].cos()), float(angles[position, i].sin()))
            turned = complex(float(head[i]), float(head[i + half])) * turn
            out[i], out[i + half] = turned.real, turned.imag
        return out

    positions = [6, 7, 8, 9, 10, 0]
    for token, (position, row) in enumerate(zip(positions, [2] * 5 + [4], strict=True)):
        heads = qkv[token].view(10, 16)
        for head in range(6):
            want = expected(heads[head], position, norm.query_weight if norm else None)
            torch.testing.assert_close(query[token, head], want, rtol=1e-4, atol=1e-5)
        place = tables[row][position // SIZE], position % SIZE
        for head in range(2):
            want = expected(heads[6 + head], position, norm.key_weight if norm else None)
            torch.testing.assert_close(cache.keys[place][head], want, rtol=1e-4, atol=1e-5)
            assert torch.equal(cache.values[place][head], heads[8 + head])
    assert int((cache.values != 0).any(-1).any(-1).sum()) == 6


def test_block_bytes_counts_what_is_allocated() -> None:
    layer = LAYERS["grouped"]
    attention = ReferenceAttention(CPU)
    for dtype in ("float32", "bfloat16"):
        (cache,) = attention.allocate([layer], limits(), dtype)
        assert (
            attention.block_bytes(layer, SIZE, dtype) * limits().num_blocks == cache.keys.nbytes + cache.values.nbytes
        )
