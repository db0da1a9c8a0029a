"""Paged attention, its plan and the cache write, against the torch reference over the same plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepShape
from isthmus.errors import Unsupported
from isthmus.plan import StepPlan
from isthmus.reference import ReferenceAttention, ReferenceInputs
from isthmus_triton.attention import TritonAttention
from isthmus_triton.launch import LaunchTable, launch_table

LIMITS = Limits(max_rows=8, max_tokens=256, max_model_len=320, block_size=16, num_blocks=170, vocab_size=64)
LAYER = AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125)
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Step:
    """One step's inputs on the device, with every row's earlier keys and values written by the reference."""

    def __init__(
        self,
        device: torch.device,
        arch: str,
        spans: list[tuple[int, int]],  # (start, length) of each row
        layer: AttentionSpec,
        dtype: torch.dtype,
        limits: Limits,
        table: LaunchTable | None = None,
        units: int = 3,
        shared_blocks: int = 0,
        kv_dtype: str = "",
    ) -> None:
        self.layer, self.dtype, self.device, self.limits = layer, dtype, device, limits
        generator = torch.Generator().manual_seed(7)
        self.random = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
        name = kv_dtype or str(dtype).removeprefix("torch.")
        self.kept = getattr(torch, name)
        self.reference = ReferenceAttention(device)
        self.triton = TritonAttention(device, table or launch_table(arch), units, eight_bit_cache=True)
        [self.reference_cache] = self.reference.allocate([layer], limits, name)
        [self.triton_cache] = self.triton.allocate([layer], limits, name)

        order = np.random.default_rng(3).permutation(np.arange(1, limits.num_blocks, dtype=np.int32))
        rows, places, blocks = [], [], []
        for row, (start, length) in enumerate(spans):
            for place in range(-(-(start + length) // limits.block_size)):
                rows.append(row)
                places.append(place)
                blocks.append(order[place if place < shared_blocks else len(blocks) + shared_blocks])
        self.reference_inputs = ReferenceInputs(device)
        self.state = self.reference_inputs.allocate(limits)
        self.plan = StepPlan(
            step=0,
            block_rows=np.array(rows, np.int32),
            block_indices=np.array(places, np.int32),
            block_ids=np.array(blocks, np.int32),
            span_rows=np.arange(len(spans), dtype=np.int32),
            span_starts=np.array([start for start, _ in spans], np.int32),
            span_lengths=np.array([length for _, length in spans], np.int32),
            span_samples=np.ones(len(spans), np.bool_),
        )
        self.reference_inputs.upload(self.plan, self.state)
        # Stale blocks hold NaN: what a row has not written must not matter.
        for cache in (self.reference_cache.keys, self.reference_cache.values):
            cache[0] = float("nan")
        for cache in (self.triton_cache.keys, self.triton_cache.values):
            cache.fill_(float("nan"))
        self._write_history(spans, rows, places, blocks)

    def _write_history(
        self, spans: list[tuple[int, int]], rows: list[int], places: list[int], blocks: list[int]
    ) -> None:
        size = self.limits.block_size
        seen: set[int] = set()
        for row, place, block in zip(rows, places, blocks, strict=True):
            known = min(size, max(0, spans[row][0] - place * size))
            shape = (known, self.layer.kv_heads, self.layer.head_dim)
            if block in seen:
                continue
            seen.add(block)
            keys, values = (self.random(*shape).to(self.kept) for _ in range(2))
            self.reference_cache.keys[block, :known], self.reference_cache.values[block, :known] = keys, values
            self.triton_cache.keys[block, :, :known] = keys.transpose(0, 1)
            self.triton_cache.values[block, :, :known] = values.transpose(0, 1)

    def run(
        self,
        rotary_dim: int | None = None,
        qk_norm: bool = False,
        pad_tokens: int = 0,
        pad_spans: int = 0,
        bounded: bool = False,
        no_singles: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``bounded``: what the host knows of the spans are bounds, as in a captured step."""
        layer = self.layer
        rotary_dim = layer.head_dim if rotary_dim is None else rotary_dim
        angles = torch.rand(self.limits.max_model_len, rotary_dim // 2, generator=torch.Generator().manual_seed(1)) * 6
        rotary = RotarySpec(cos_sin=torch.cat((angles.cos(), angles.sin()), -1).to(self.device), rotary_dim=rotary_dim)
        norm = None
        if qk_norm:
            weights = torch.rand(2, layer.head_dim, generator=torch.Generator().manual_seed(2)).to(self.device) + 0.5
            norm = QkNorm(query_weight=weights[0], key_weight=weights[1], epsilon=1e-5)
        shape = StepShape(self.plan.num_tokens, self.plan.num_spans, self.plan.num_spans)
        exact = self.reference_inputs.build(self.state, shape)
        padded = self.reference_inputs.build(
            self.state, shape._replace(tokens=shape.tokens + pad_tokens, spans=shape.spans + pad_spans)
        )
        padded = replace(padded, no_singles=no_singles)
        if bounded:
            limit = self.limits.max_model_len
            padded = replace(padded, max_query_length=padded.num_tokens, max_context_length=limit)
        qkv = self.random(padded.num_tokens, (layer.heads + 2 * layer.kv_heads) * layer.head_dim)
        tokens = exact.num_tokens
        query = self.reference.rotate_and_store(qkv[:tokens], self.reference_cache, layer, rotary, norm, exact)
        expected = self.reference.attend(query, self.reference_cache, layer, self.reference.plan(exact), exact)
        plan = self.triton.plan(padded)
        triton_query = self.triton.rotate_and_store(qkv, self.triton_cache, layer, rotary, norm, padded)
        torch.testing.assert_close(triton_query[:tokens], query, atol=TOLERANCE[self.dtype], rtol=TOLERANCE[self.dtype])
        # Twice: what one launch leaves in its counters must not disturb the next.
        for _ in range(2):
            out = self.triton.attend(triton_query, self.triton_cache, layer, plan, padded)
        return out[:tokens], expected


def check(step: Step, **options: object) -> None:
    out, expected = step.run(**options)
    tolerance = TOLERANCE[step.dtype]
    if step.kept.itemsize == 1 and step.dtype == torch.bfloat16:
        tolerance = 8e-2  # a last bit of a key in bf16 may become one of three in the cache
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


EIGHT_BITS = "float8_e4m3fn"
DECODE = [(0, 1), (16, 1), (130, 1), (33, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode(device: torch.device, arch: str, dtype: torch.dtype) -> None:
    check(Step(device, arch, DECODE, LAYER, dtype, LIMITS))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_decode_block_sizes(device: torch.device, arch: str, block_size: int) -> None:
    limits = replace(LIMITS, block_size=block_size, num_blocks=1 + 8 * (-(-LIMITS.max_model_len // block_size)))
    check(Step(device, arch, [(200, 1), (65, 1)], LAYER, torch.float32, limits))


@pytest.mark.parametrize(
    "layer",
    [
        replace(LAYER, head_dim=96),
        replace(LAYER, heads=2, kv_heads=2, head_dim=128),
        replace(LAYER, heads=2, kv_heads=1, head_dim=256),
        replace(LAYER, window=40),
        replace(LAYER, softcap=5.0),
        replace(LAYER, heads=16, kv_heads=1),
    ],
    ids=["dim96", "dim128", "dim256", "window", "softcap", "group16"],
)
def test_layers(device: torch.device, arch: str, layer: AttentionSpec) -> None:
    check(Step(device, arch, [(100, 1), (60, 3), (21, 40)], layer, torch.float32, LIMITS))


@pytest.mark.parametrize("units", [1, 7, 40])
def test_result_does_not_depend_on_the_grid(device: torch.device, arch: str, units: int) -> None:
    """From one program walking all work to more programs than tiles."""
    check(Step(device, arch, [(255, 1), (0, 1), (64, 2)], LAYER, torch.float32, LIMITS, units=units))


@pytest.mark.parametrize("at_once", [1024, 64, 0])
def test_merging_of_more_parts_than_are_taken_at_once(device: torch.device, arch: str, at_once: int) -> None:
    table = launch_table(arch)
    table = replace(table, decode=tuple((most, replace(launch, merged=at_once)) for most, launch in table.decode))
    layer = replace(LAYER, heads=6)
    check(Step(device, arch, [(300, 1), (200, 2)], layer, torch.float32, LIMITS, table=table, units=20))


def test_verify_spans(device: torch.device, arch: str) -> None:
    check(Step(device, arch, [(100, 8), (31, 2), (7, 5), (63, 1)], LAYER, torch.float32, LIMITS))


@pytest.mark.parametrize(
    "spans", [[(130, 1), (16, 50), (0, 5), (255, 1)], [(0, 2)], [(255, 1)]], ids=["mixed", "short", "one token"]
)
def test_a_captured_step_of_any_spans(device: torch.device, arch: str, spans: list[tuple[int, int]]) -> None:
    check(Step(device, arch, spans, LAYER, torch.float32, LIMITS), pad_tokens=9, pad_spans=3, bounded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prefill(device: torch.device, arch: str, dtype: torch.dtype) -> None:
    check(Step(device, arch, [(0, 70), (50, 33), (16, 9)], LAYER, dtype, LIMITS))


def test_mixed_spans_with_padding(device: torch.device, arch: str) -> None:
    step = Step(device, arch, [(120, 1), (0, 65), (40, 4), (255, 1)], LAYER, torch.float32, LIMITS)
    check(step, pad_tokens=13, pad_spans=3)


def test_decode_with_padding(device: torch.device, arch: str) -> None:
    check(Step(device, arch, DECODE, LAYER, torch.float32, LIMITS), pad_tokens=4, pad_spans=4)


@pytest.mark.parametrize(("rotary_dim", "qk_norm"), [(32, False), (64, True), (16, True)])
def test_rotary_and_norm(device: torch.device, arch: str, rotary_dim: int, qk_norm: bool) -> None:
    check(Step(device, arch, [(20, 1), (5, 12)], LAYER, torch.float32, LIMITS), rotary_dim=rotary_dim, qk_norm=qk_norm)


def test_a_neighbour_changes_nothing(device: torch.device, arch: str) -> None:
    """The second row's result is the same whatever the first one is, up to the order of sums."""
    short = Step(device, arch, [(5, 1), (150, 1)], LAYER, torch.float32, LIMITS)
    long = Step(device, arch, [(5, 1), (150, 1)], LAYER, torch.float32, LIMITS)
    long.triton_cache.keys[long.state.block_tables[0, 0]] = float("nan")
    expected, _ = short.run()
    out, _ = long.run()
    assert torch.isnan(out[0]).any()
    torch.testing.assert_close(out[1], expected[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("shared_blocks", "units"), [(0, 6), (2, 40), (5, 1), (5, 6)])
def test_keys_that_all_short_spans_share(device: torch.device, arch: str, shared_blocks: int, units: int) -> None:
    table = replace(launch_table(arch), share_spans=2, share_tiles=1)
    spans = [(96, 1), (97, 1), (80, 1), (250, 1), (130, 1), (85, 40)]
    step = Step(
        device, arch, spans, LAYER, torch.float32, LIMITS, table=table, units=units, shared_blocks=shared_blocks
    )
    check(step, pad_tokens=3, pad_spans=2)
    [buffers] = step.triton._buffers.values()
    key_tile = table.decode_for(256).key_tile
    assert buffers.programs[4].item() == shared_blocks * 16 // key_tile


def test_verify_spans_share_nothing(device: torch.device, arch: str) -> None:
    table = replace(launch_table(arch), share_spans=2, share_tiles=1)
    spans = [(96, 1), (97, 2), (80, 1)]
    check(Step(device, arch, spans, LAYER, torch.float32, LIMITS, table=table, shared_blocks=5))


@pytest.mark.parametrize(
    ("dtype", "spans"),
    [
        (torch.float32, DECODE),
        (torch.bfloat16, DECODE),
        (torch.float16, [(100, 8), (31, 2), (63, 1)]),
        (torch.bfloat16, [(0, 70), (50, 33), (200, 1)]),
    ],
    ids=["decode float32", "decode bfloat16", "verify float16", "prefill bfloat16"],
)
def test_a_cache_of_8_bits(
    device: torch.device, arch: str, dtype: torch.dtype, spans: list[tuple[int, int]], eight_bits: None
) -> None:
    check(Step(device, arch, spans, LAYER, dtype, LIMITS, kv_dtype=EIGHT_BITS))


def test_shared_keys_of_8_bits(device: torch.device, arch: str, eight_bits: None) -> None:
    table = replace(launch_table(arch), share_spans=2, share_tiles=1)
    spans = [(96, 1), (97, 1), (130, 1), (85, 40)]
    step = Step(
        device, arch, spans, LAYER, torch.bfloat16, LIMITS, table=table, units=6, shared_blocks=5, kv_dtype=EIGHT_BITS
    )
    check(step, pad_tokens=3, pad_spans=2)


def test_8_bits_hold_their_largest_number_for_more_and_keep_a_nan(
    device: torch.device, arch: str, eight_bits: None
) -> None:
    """Every finite number of float16 becomes what the reference makes of it."""
    layer = replace(LAYER, heads=4, kv_heads=4)
    step = Step(device, arch, [(0, 256)], layer, torch.float16, LIMITS, kv_dtype=EIGHT_BITS)
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(256, 256)
    numbers = torch.where(numbers.isnan(), float("nan"), numbers).nan_to_num(float("nan")).to(device)
    qkv = torch.cat((torch.zeros_like(numbers), torch.zeros_like(numbers), numbers), 1)
    turn = torch.tensor([1.0, 0.0], device=device).repeat_interleave(8)
    rotary = RotarySpec(cos_sin=turn.expand(256, 16).contiguous(), rotary_dim=16)
    inputs = step.reference_inputs.build(step.state, StepShape(256, 1, 1))
    step.reference.rotate_and_store(qkv, step.reference_cache, layer, rotary, None, inputs)
    step.triton.rotate_and_store(qkv, step.triton_cache, layer, rotary, None, inputs)
    blocks = torch.from_numpy(step.plan.block_ids).long().to(device)
    expected = step.reference_cache.values.float()[blocks]
    assert expected.nan_to_num().abs().max() == 448 and expected.isnan().any()
    torch.testing.assert_close(
        step.triton_cache.values.float()[blocks].transpose(1, 2), expected, atol=0, rtol=0, equal_nan=True
    )


def test_8_bits_where_the_device_has_none(device: torch.device, arch: str) -> None:
    plain = TritonAttention(device, launch_table(arch), 3)
    with pytest.raises(Unsupported, match="16-bit"):
        plain.allocate([LAYER], LIMITS, EIGHT_BITS)
