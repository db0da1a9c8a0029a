"""The compiled paged attention against the reference's, over random spans and block tables."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepInputs, StepShape
from isthmus.errors import BackendUnavailable, Unsupported
from isthmus.plan import RowStart, StepPlan
from isthmus.reference import ReferenceAttention, ReferenceInputs
from isthmus.sampling_params import RowSampling
from isthmus_cpu.attention import PanelAttention
from isthmus_cpu.build import kernels_library
from isthmus_cpu.library import Library, Pool
from isthmus_cpu.runner import Runner

ROWS, MAX_LEN = 6, 420
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def attention() -> Iterator[PanelAttention]:
    try:
        library = Library(kernels_library())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    pool = Pool(library, 2)
    yield PanelAttention(Runner(pool), library.value_padding)
    pool.close()


def limits_of(block_size: int) -> Limits:
    per_row = -(-MAX_LEN // block_size)
    return Limits(
        max_rows=ROWS,
        max_tokens=2048,
        max_model_len=MAX_LEN,
        block_size=block_size,
        num_blocks=1 + ROWS * per_row,
        vocab_size=10,
    )


def spec_of(
    head_dim: int = 64, heads: int = 6, kv_heads: int = 2, window: int = 0, softcap: float = 0
) -> AttentionSpec:
    return AttentionSpec(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, window=window, softcap=softcap
    )


class Pair:
    """Runs the same steps through both implementations and compares."""

    def __init__(self, ours: PanelAttention, spec: AttentionSpec, block_size: int, kv_dtype: str, seed: int) -> None:
        self.ours, self.spec = ours, spec
        self.limits = limits_of(block_size)
        self.reference = ReferenceAttention(CPU)
        self.inputs = ReferenceInputs(CPU)
        self.state = self.inputs.allocate(self.limits)
        self.caches = (
            ours.allocate([spec], self.limits, kv_dtype)[0],
            self.reference.allocate([spec], self.limits, kv_dtype)[0],
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.tolerance = 1.2e-2 if kv_dtype == "bfloat16" else 2e-5
        per_row = self.limits.max_blocks_per_row
        ids = list(range(1, 1 + ROWS * per_row))
        random.Random(seed).shuffle(ids)
        self.blocks = np.array(ids, np.int32).reshape(ROWS, per_row)
        self.step = 0

    def start(self) -> None:
        """Every row's whole table at once."""
        rows = np.repeat(np.arange(ROWS, dtype=np.int32), self.blocks.shape[1])
        self._run(
            spans=[(0, 0, 1)],
            starts=tuple(
                RowStart(
                    row=row,
                    tokens=np.zeros(1, np.int32),
                    num_prompt_tokens=1,
                    sampling=RowSampling(max_tokens=1),
                )
                for row in range(ROWS)
            ),
            block_rows=rows,
            block_indices=np.tile(np.arange(self.blocks.shape[1], dtype=np.int32), ROWS),
            block_ids=self.blocks.flatten(),
        )

    def run(self, spans: list[tuple[int, int, int]], rotary: RotarySpec, norm: QkNorm | None = None) -> Tensor:
        """Spans are (row, start, length).  Returns our output after comparing it."""
        inputs = self._run(spans)
        spec = self.spec
        qkv = torch.randn(
            (inputs.num_tokens, (spec.heads + 2 * spec.kv_heads) * spec.head_dim), generator=self.generator
        )
        outputs = []
        for part, cache in zip((self.ours, self.reference), self.caches, strict=True):
            plan = part.plan(inputs)
            query = part.rotate_and_store(qkv, cache, spec, rotary, norm, inputs)
            outputs += [query, part.attend(query, cache, spec, plan, inputs)]
        torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs[1], outputs[3], rtol=self.tolerance, atol=self.tolerance)
        return outputs[1]

    def _run(self, spans: list[tuple[int, int, int]], **more: object) -> StepInputs:
        plan = StepPlan(
            step=self.step,
            span_rows=np.array([row for row, _, _ in spans], np.int32),
            span_starts=np.array([start for _, start, _ in spans], np.int32),
            span_lengths=np.array([length for _, _, length in spans], np.int32),
            span_samples=np.ones(len(spans), np.bool_),
            **more,  # type: ignore[arg-type]
        )
        self.step += 1
        self.inputs.upload(plan, self.state)
        return self.inputs.build(self.state, StepShape(plan.num_tokens, plan.num_spans, plan.num_spans))


def rotary_of(head_dim: int, rotary_dim: int | None = None) -> RotarySpec:
    width = rotary_dim or head_dim
    angles = torch.arange(MAX_LEN)[:, None] * 0.3 ** torch.linspace(0, 8, width // 2)[None]
    return RotarySpec(cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1), rotary_dim=width)


def random_steps(seed: int, count: int) -> list[list[tuple[int, int, int]]]:
    """Rows advance by spans of random length, prefill and decode mixed."""
    chooser = random.Random(seed)
    reached = [0] * ROWS
    steps = []
    for _ in range(count):
        spans = []
        for row in chooser.sample(range(ROWS), chooser.randint(1, ROWS)):
            length = min(chooser.choice([1, 1, 1, 2, 15, 17, 40, 130]), MAX_LEN - reached[row])
            if length:
                spans.append((row, reached[row], length))
                reached[row] += length
        if spans:
            steps.append(spans)
    return steps


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [2, 10, 32, 64, 80, 96, 128, 256])
def test_head_dimensions(attention: PanelAttention, head_dim: int, kv_dtype: str) -> None:
    pair = Pair(attention, spec_of(head_dim), 16, kv_dtype, seed=head_dim)
    pair.start()
    for spans in random_steps(head_dim, 5):
        pair.run(spans, rotary_of(head_dim))


@pytest.mark.parametrize("window", [0, 1, 7, 100])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_windows_and_softcaps(attention: PanelAttention, window: int, softcap: float, block_size: int) -> None:
    pair = Pair(attention, spec_of(32, window=window, softcap=softcap), block_size, "float32", seed=window)
    pair.start()
    for spans in random_steps(window + block_size, 6):
        pair.run(spans, rotary_of(32))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1), (14, 2)])
def test_grouped_heads(attention: PanelAttention, heads: int, kv_heads: int) -> None:
    pair = Pair(attention, spec_of(16, heads, kv_heads), 16, "float32", seed=heads)
    pair.start()
    for spans in random_steps(heads, 5):
        pair.run(spans, rotary_of(16))


def test_query_norms_and_partial_rotation(attention: PanelAttention) -> None:
    generator = torch.Generator().manual_seed(5)
    norm = QkNorm(
        query_weight=torch.rand(64, generator=generator),
        key_weight=torch.rand(64, generator=generator),
        epsilon=1e-6,
    )
    pair = Pair(attention, spec_of(64), 16, "float32", seed=5)
    pair.start()
    for spans in random_steps(5, 4):
        pair.run(spans, rotary_of(64, 24), norm)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_what_a_block_held_before_does_no_harm(attention: PanelAttention, kv_dtype: str) -> None:
    pair = Pair(attention, spec_of(16), 16, kv_dtype, seed=9)
    pair.start()
    cache = pair.caches[0]
    for memory in (cache.keys, cache.values):
        memory.fill_(0xFF)  # a NaN in either dtype
    for length in (1, 3, 17):
        out = pair.run([(2, 0, length)], rotary_of(16))
        assert torch.isfinite(out).all()
        memory.fill_(0xFF)


def test_an_odd_head_dimension_is_refused(attention: PanelAttention) -> None:
    with pytest.raises(Unsupported, match="even head dimension"):
        attention.allocate([spec_of(15)], limits_of(16), "float32")


def test_block_bytes_are_what_is_allocated(attention: PanelAttention) -> None:
    spec, limits = spec_of(80), limits_of(16)
    cache = attention.allocate([spec], limits, "bfloat16")[0]
    taken = cache.keys.numel() + cache.values.numel()
    assert taken == attention.block_bytes(spec, 16, "bfloat16") * limits.num_blocks
