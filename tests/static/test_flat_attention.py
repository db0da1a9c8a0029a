"""Flat paged attention against float64, over random steps in buckets."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus.contract import AttentionSpec
from isthmus.testing.suite.golden import attend
from isthmus_gaudi.flat_attention import FlatBlocks, flat_paged_attention, list_blocks, most_blocks
from isthmus_static.buckets import exponential, holding, linear

# torch's CPU kernel says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")

Ints = npt.NDArray[np.int32]
SPAN_BUCKETS = exponential(1, 16)
NUM_BLOCKS = 96
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of an element's size and of the largest: scores and sums are float32, so beyond float32's own error there is but
the rounding of the result, half of this."""


def listed(tables: Ints, rows: Ints, contexts: Ints, count: int, block_size: int, window: int) -> FlatBlocks:
    arrays = (torch.from_numpy(np.asarray(array, np.int32)) for array in (tables, rows, contexts))
    return list_blocks(*arrays, count, block_size, window)


@dataclasses.dataclass
class Step:
    """One layer's cache and a decode step over it; every slot that no span sees is NaN."""

    layer: AttentionSpec
    block_size: int
    dtype: torch.dtype
    keys: Tensor
    values: Tensor
    query: Tensor  # [spans, heads, head_dim]
    tables: Ints
    rows: Ints
    contexts: Ints

    def seen(self, span: int) -> np.ndarray:
        """Slots of the keys that a span's query sees, in order."""
        context = int(self.contexts[span])
        positions = np.arange(max(0, context - self.layer.window) if self.layer.window else 0, context)
        blocks = self.tables[self.rows[span], positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def expected(self) -> Tensor:
        whole = dataclasses.replace(self.layer, window=0)
        out = torch.zeros(len(self.rows), self.layer.heads * self.layer.head_dim, dtype=torch.float64)
        for span in range(len(self.rows)):
            slots = torch.from_numpy(self.seen(span))
            if len(slots):
                keys, values = self.keys[slots], self.values[slots]
                out[span] = attend(self.query[span : span + 1], keys, values, len(slots) - 1, whole)[0]
        return out

    def padded(self) -> tuple[Tensor, FlatBlocks]:
        """The query and blocks in their buckets; a padded query is NaN."""
        spans, given = holding(SPAN_BUCKETS, len(self.rows)), len(self.rows)
        rows, contexts = np.zeros((2, spans), np.int32)
        rows[:given], contexts[:given] = self.rows, self.contexts
        bucket = holding(linear(4, 16, 256), int((-(-contexts // self.block_size)).sum()))
        count = most_blocks(bucket, spans, self.block_size, self.layer.window)
        blocks = listed(self.tables, rows, contexts, count, self.block_size, self.layer.window)
        query = torch.full((spans, *self.query.shape[1:]), float("nan"), dtype=self.dtype)
        query[:given] = self.query
        return query, blocks

    def run(self, attention: Callable[..., Tensor] = flat_paged_attention) -> Tensor:
        query, blocks = self.padded()
        return attention(query, self.keys, self.values, blocks, self.block_size, self.layer)


def random_layer(random: np.random.Generator) -> AttentionSpec:
    kv_heads, group, dim = (int(random.choice(choice)) for choice in ([1, 2, 4], range(1, 9), [64, 96, 128]))
    return AttentionSpec(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        window=int(random.choice([0, 0, 1, 16, 40, 150])),
        softcap=float(random.choice([0.0, 5.0])),
    )


def random_step(
    random: np.random.Generator, layer: AttentionSpec, block_size: int = 16, dtype: torch.dtype = torch.float32
) -> Step:
    spans = int(random.integers(1, 17))
    contexts = random.integers(1, 12 * 16, spans).astype(np.int32)
    contexts[random.random(spans) < 0.1] = 0
    contexts[random.random(spans) < 0.2] = block_size  # a block that is just full
    width = int(-(-max(contexts.max(), 1) // block_size))
    owned = -(-contexts // block_size)
    pool = random.permutation(np.arange(1, NUM_BLOCKS))[: int(owned.sum())]
    tables = np.zeros((20, width), np.int32)
    rows = random.permutation(20)[:spans].astype(np.int32)
    at = np.cumsum(owned) - owned
    for span, row in enumerate(rows):
        mine = pool[at[span] : at[span] + owned[span]]
        tables[row, : len(mine)] = mine
        tables[row, len(mine) : owned[span]] = random.integers(1, NUM_BLOCKS, owned[span] - len(mine))
        if span and random.random() < 0.4:  # the prefix of an earlier row
            shared = int(random.integers(0, 1 + min(owned[span], owned[span - 1])))
            tables[row, :shared] = tables[rows[span - 1], :shared]

    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    shape = (NUM_BLOCKS * block_size, layer.kv_heads, layer.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    query = (3 * torch.randn((spans, layer.heads, layer.head_dim), generator=generator)).to(dtype)
    step = Step(layer, block_size, dtype, keys, values, query, tables, rows, contexts)
    unseen = torch.ones(shape[0], dtype=torch.bool)
    for span in range(spans):
        unseen[torch.from_numpy(step.seen(span))] = False
    keys[unseen], values[unseen] = float("nan"), float("nan")
    return step


def require_close(step: Step, out: Tensor) -> None:
    spans, expected = len(step.rows), step.expected()
    assert out.shape == (holding(SPAN_BUCKETS, spans), step.layer.heads * step.layer.head_dim)
    assert out.dtype == step.dtype
    assert torch.equal(out[spans:], torch.zeros_like(out[spans:])), "padded spans have no block and give zeros"
    error = (out[:spans].double() - expected).abs()
    allowed = TOLERANCE[step.dtype] * (expected.abs() + expected.abs().max())
    assert bool((error <= allowed).all()), (
        f"off by {error.max():.3g} of {expected.abs().max():.3g} in {step.dtype}, {step.layer}"
    )


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_random_steps_equal_float64(seed: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(seed)
    for block_size in (16, 16, 128):
        step = random_step(random, random_layer(random), block_size, dtype)
        require_close(step, step.run())


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 30.0)])
def test_one_graph_a_bucket(window: int, softcap: float) -> None:
    graphs = []

    def backend(module: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward  # what backend="eager" does

    layer = AttentionSpec(heads=6, kv_heads=2, head_dim=64, scale=0.125, window=window, softcap=softcap)
    random, met = np.random.default_rng(5), set()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled = torch.compile(flat_paged_attention, backend=backend, fullgraph=True, dynamic=False)
        steps = [random_step(random, layer) for _ in range(12)]
        for step in steps + steps:
            query, blocks = step.padded()
            met.add((len(query), len(blocks.block_list)))
            assert torch.equal(step.run(compiled), step.run())
    torch._dynamo.reset()
    assert len(met) >= 4 and len(graphs) == len(met)


def test_what_a_device_is_asked_for() -> None:
    """No CPU tensor among the device's, no shape that depends on data, and few operations that move data."""
    layer = AttentionSpec(heads=8, kv_heads=2, head_dim=64, scale=0.125, softcap=30.0)
    mode = FakeTensorMode()
    with mode, torch.device("meta"):
        query = torch.empty(4, 8, 64, dtype=torch.bfloat16)
        keys, values = (torch.empty(32 * 16, 2, 64, dtype=torch.bfloat16) for _ in range(2))
        blocks = [torch.empty(12, dtype=torch.int32) for _ in range(4)]
    # A tensor made without a device is the CPU's, and refused beside these.
    with mode:
        graph = make_fx(lambda q, k, v, *b: flat_paged_attention(q, k, v, FlatBlocks(*b), 16, layer))(
            query, keys, values, *blocks
        )
    counts = collections.Counter(
        node.target._schema.name.removeprefix("aten::") for node in graph.graph.nodes if node.op == "call_function"
    )
    assert counts["index_select"] == 3  # keys, values, and the spans' peaks
    assert counts["index_reduce"] == 1
    assert counts["mm"] == 2 and counts["bmm"] == 2  # to blocks and back, scores and values
    moving = {name for name in counts if "scatter" in name or "gather" in name or "index" in name or "sort" in name}
    assert moving == {"index_select", "index_reduce"}
    assert not {"nonzero", "masked_select", "_local_scalar_dense", "item", "scalar_tensor"} & set(counts)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_a_nan_stays_with_its_span(where: str) -> None:
    layer = AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125)
    random = np.random.default_rng(3)
    step = random_step(random, layer)
    while len(step.rows) < 8:
        step = random_step(random, layer)
    clean = step.run()
    seen = [set(step.seen(span)) for span in range(len(step.rows))]
    others = {span: set().union(*seen[:span], *seen[span + 1 :]) for span in range(len(seen))}
    victim, slot = next((span, min(seen[span] - others[span])) for span in others if seen[span] - others[span])
    {"query": step.query, "key": step.keys, "value": step.values}[where][victim if where == "query" else slot, 1] = (
        float("nan")
    )
    out = step.run()
    assert bool(out[victim].isnan().any())
    rest = [span for span in range(len(out)) if span != victim]
    assert torch.equal(out[rest], clean[rest])


@settings(deadline=None)
@given(
    contexts=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    block_size=st.sampled_from([1, 16, 128]),
    window=st.sampled_from([0, 1, 16, 33]),
    spare=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_blocks_are_listed_as_one_by_one(
    contexts: list[int], block_size: int, window: int, spare: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tables = random.integers(1, 10_000, (len(contexts) + 3, 201)).astype(np.int32)
    rows = random.permutation(len(tables))[: len(contexts)].astype(np.int32)
    expected = []
    for span, context in enumerate(contexts):
        positions = [p for p in range(context) if not window or p >= context - window]
        for block, members in itertools.groupby(positions, lambda p: p // block_size):
            inside = [p % block_size for p in members]
            expected.append((tables[rows[span], block], span, inside[0], inside[-1] + 1))

    blocks = listed(tables, rows, np.array(contexts), len(expected) + spare, block_size, window)
    assert all(array.dtype == torch.int32 for array in blocks)
    assert list(zip(*(array.tolist() for array in blocks), strict=True)) == expected + [(0, -1, 0, 0)] * spare
    bucket = sum(-(-context // block_size) for context in contexts)
    assert len(expected) <= most_blocks(bucket, len(contexts), block_size, window) <= bucket


def test_any_order_of_blocks_gives_the_same() -> None:
    step = random_step(np.random.default_rng(8), AttentionSpec(heads=8, kv_heads=1, head_dim=64, scale=0.125))
    query, blocks = step.padded()
    order = torch.randperm(len(blocks.block_list), generator=torch.Generator().manual_seed(1))
    shuffled = FlatBlocks(*(array[order] for array in blocks))
    out = flat_paged_attention(query, step.keys, step.values, shuffled, step.block_size, step.layer)
    require_close(step, out)
