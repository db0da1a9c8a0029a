"""Paged attention over random block tables, mixtures of spans, windows, soft caps and shared prefixes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec
from isthmus.errors import OutOfMemory, Unsupported
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.golden import attend, eight_bits, random, require_close, rms_norm, rotate
from isthmus.testing.suite.steps import Span, Starting, Stepper, fitting, mixable, plan_of

pytestmark = [pytest.mark.requires_parts]

MAX_LEN, EPSILON = 384, 1e-6
DTYPES = ["float32", "bfloat16", "float16"]
EIGHT_BITS = "float8_e4m3fn"


@dataclasses.dataclass(kw_only=True)
class Case:
    """One layer's cache on the device, and every row's keys and values as they should stand in it."""

    device: DeviceUnderTest
    layer: AttentionSpec
    dtype: str
    kv_dtype: str
    block_size: int
    rotary_dim: int = 0
    norm: bool = False
    seed: int = 0
    rows: int = 6
    value_scale: float = 1.0
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    values: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    blocks: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        capabilities = self.device.capabilities
        self.rows, tokens = fitting(capabilities, rows=self.rows, tokens=512)
        per_row = -(-MAX_LEN // self.block_size)
        self.limits = Limits(
            max_rows=self.rows,
            max_tokens=tokens,
            max_model_len=MAX_LEN,
            block_size=self.block_size,
            num_blocks=1 + self.rows * per_row,
            vocab_size=64,
        )
        self.random = np.random.default_rng(self.seed)
        self.free = [int(block) for block in self.random.permutation(np.arange(1, self.limits.num_blocks))]
        self.stepper = Stepper(self.device, self.limits)
        attention, dim = self.device.parts.attention, self.layer.head_dim
        self.cache = self.device.run(lambda: attention.allocate([self.layer], self.limits, self.kv_dtype))[0]
        angles = torch.arange(MAX_LEN)[:, None] / 10000 ** (torch.arange(0, self._rotated, 2) / self._rotated)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1).float()
        self.rotary = RotarySpec(cos_sin=self.device.put(self.cos_sin), rotary_dim=self._rotated)
        self.norms = [1 + 0.1 * random(dim, seed=seed) for seed in (31, 32)]
        on_device = [self.device.put(weight) for weight in self.norms]
        self.qk_norm = (
            QkNorm(query_weight=on_device[0], key_weight=on_device[1], epsilon=EPSILON) if self.norm else None
        )

    @property
    def _rotated(self) -> int:
        return self.rotary_dim or self.layer.head_dim

    @property
    def tolerance(self) -> str:
        """The coarser of the two dtypes decides."""
        order = ("float32", "float16", "bfloat16", EIGHT_BITS)
        return max(self.dtype, self.kv_dtype, key=order.index)

    def kept(self, x: Tensor) -> Tensor:
        """What a cache of 8 bits makes of float64 keys or values: too coarse to be left to a tolerance."""
        return eight_bits(x) if self.kv_dtype == EIGHT_BITS else x

    def computed(self, row: int) -> int:
        return len(self.keys[row]) if row in self.keys else 0

    def forget(self, row: int) -> None:
        """The row's sequence ends, and its blocks may go to another."""
        for table in (self.keys, self.values):
            table.pop(row)
        self.free += self.blocks.pop(row)

    def step(self, lengths: dict[int, int], shared: dict[int, tuple[int, int]] | None = None) -> None:
        """Rows compute so many tokens more; compares each span's attention.  ``shared`` rows begin
        with (another row, tokens) whose blocks they read."""
        starts: dict[int, Starting] = {}
        appends: list[tuple[int, int, int]] = []
        for row, length in lengths.items():
            fresh = row not in self.blocks
            if fresh:
                source, count = (shared or {}).get(row, (0, 0))
                self.blocks[row] = self.blocks[source][: count // self.block_size] if count else []
                self.keys[row] = self.keys[source][:count] if count else torch.zeros(0, self.layer.kv_heads, self._dim)
                self.values[row] = self.values[source][:count] if count else self.keys[row]
            before = len(self.blocks[row])
            needed = -(-(self.computed(row) + length) // self.block_size)
            self.blocks[row] += [self.free.pop() for _ in range(needed - before)]
            if fresh:
                starts[row] = Starting([1] * (self.computed(row) + length), self.blocks[row])
            else:
                appends += [(row, place, self.blocks[row][place]) for place in range(before, needed)]
        spans = [Span(row, self.computed(row), length) for row, length in lengths.items()]
        self._run(plan_of(self.steps, spans, starts, appends), spans)
        self.steps += 1

    @property
    def _dim(self) -> int:
        return self.layer.head_dim

    def _run(self, plan: Any, spans: list[Span]) -> None:
        layer, attention = self.layer, self.device.parts.attention
        hidden = self.device.hidden_dtype(self.dtype)
        heads = layer.heads + 2 * layer.kv_heads
        numbers = random(plan.num_tokens, heads * self._dim, seed=1000 * self.seed + self.steps)
        numbers[:, (layer.heads + layer.kv_heads) * self._dim :] *= self.value_scale
        numbers = numbers.to(getattr(torch, self.dtype)).to(hidden)

        def step() -> tuple[Tensor, Tensor]:
            inputs = self.stepper.prepare(plan)
            padded = numbers.new_zeros(inputs.num_tokens, numbers.shape[1])
            padded[: len(numbers)] = numbers
            qkv = self.device.put(padded)
            query = attention.rotate_and_store(qkv, self.cache, layer, self.rotary, self.qk_norm, inputs)
            kept = query.clone()
            return kept, attention.attend(query, self.cache, layer, attention.plan(inputs), inputs)

        query, attended = self.device.run(step)
        self._compare(numbers.view(plan.num_tokens, heads, self._dim), query, attended, spans)

    def _compare(self, numbers: Tensor, query: Tensor, attended: Tensor, spans: list[Span]) -> None:
        layer, begin = self.layer, 0
        for span in spans:
            where = slice(begin, begin + span.length)
            begin += span.length
            q, k, v = torch.split(numbers[where].double(), [layer.heads, layer.kv_heads, layer.kv_heads], 1)
            if self.norm:
                q, k = rms_norm(q, self.norms[0], EPSILON), rms_norm(k, self.norms[1], EPSILON)
            positions = torch.arange(span.start, span.start + span.length)
            q, k = rotate(q, self.cos_sin, positions), rotate(k, self.cos_sin, positions)
            self.keys[span.row] = torch.cat((self.keys[span.row], self.kept(k)))
            self.values[span.row] = torch.cat((self.values[span.row], self.kept(v)))
            what = f"step {self.steps}, row {span.row}, positions {span.start} to {span.start + span.length - 1}"
            require_close(query[where], q, self.dtype, f"queries of {what}")
            expected = attend(q, self.keys[span.row], self.values[span.row], span.start, layer)
            require_close(attended[where], expected, self.tolerance, f"attention of {what}")

    def mixture(self, steps: int) -> None:
        """Rows in random company, one token or many at a time."""
        rows = np.arange(self.rows)
        for _ in range(steps):
            company = self.random.permutation(rows)[: int(self.random.integers(1, self.rows + 1))].tolist()
            lengths = [int(self.random.choice([1, 1, 1, 2, 5, 16, 17, 33, 64])) for _ in company]
            lengths = mixable(self.device.capabilities, lengths)
            fitting_rows: dict[int, int] = {}
            for row, length in zip(company, lengths, strict=False):
                if self.computed(row) + length > MAX_LEN:
                    continue
                if sum(fitting_rows.values()) + length <= self.limits.max_tokens:
                    fitting_rows[row] = length
            if fitting_rows:
                self.step(fitting_rows)


def spec(heads: int = 6, kv_heads: int = 2, head_dim: int = 64, **more: Any) -> AttentionSpec:
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, **more)


def first_dtypes(device: DeviceUnderTest) -> dict[str, Any]:
    """The finest dtype declared, for tests that are not about dtypes."""
    capabilities = device.capabilities
    if not device.has_parts:
        return {}
    return {
        "dtype": next(name for name in DTYPES if name in capabilities.dtypes),
        "kv_dtype": next(name for name in DTYPES if name in capabilities.kv_dtypes),
        "block_size": capabilities.block_sizes[0],
    }


@pytest.fixture
def base(isthmus_device: DeviceUnderTest) -> dict[str, Any]:
    return {"device": isthmus_device, **first_dtypes(isthmus_device)}


@pytest.mark.mandatory
@pytest.mark.parametrize("seed", range(4))
def test_mixtures_of_spans_over_random_block_tables(base: dict[str, Any], seed: int) -> None:
    Case(**base, layer=spec(), seed=seed).mixture(14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [*DTYPES, EIGHT_BITS])
def test_dtypes(isthmus_device: DeviceUnderTest, dtype: str, kv_dtype: str) -> None:
    capabilities = isthmus_device.capabilities
    for name, declared in ((dtype, capabilities.dtypes), (kv_dtype, capabilities.kv_dtypes)):
        if name not in declared:
            pytest.skip(f"undeclared: {name}")
    block_size = capabilities.block_sizes[0]
    case = Case(device=isthmus_device, layer=spec(), dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, seed=5)
    case.mixture(8)


def test_numbers_beyond_a_cache_of_8_bits_become_its_largest(base: dict[str, Any]) -> None:
    if EIGHT_BITS not in base["device"].capabilities.kv_dtypes:
        pytest.skip(f"undeclared: {EIGHT_BITS}")
    Case(**base | {"kv_dtype": EIGHT_BITS}, layer=spec(), seed=16, value_scale=400.0).mixture(6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (9, 3), (28, 4)])
def test_groups_of_heads(base: dict[str, Any], heads: int, kv_heads: int) -> None:
    Case(**base, layer=spec(heads, kv_heads), seed=6).mixture(6)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_head_dimensions(base: dict[str, Any], head_dim: int) -> None:
    if head_dim > base["device"].capabilities.max_head_dim:
        pytest.skip(f"undeclared: max_head_dim of {head_dim}")
    Case(**base, layer=spec(4, 2, head_dim), seed=7).mixture(6)


def test_every_block_size_declared(base: dict[str, Any]) -> None:
    for block_size in base["device"].capabilities.block_sizes:
        Case(**base | {"block_size": block_size}, layer=spec(), seed=8).mixture(5)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_rotation_and_norm_of_heads(base: dict[str, Any], rotary_dim: int, norm: bool) -> None:
    Case(**base, layer=spec(), norm=norm, rotary_dim=rotary_dim, seed=9).mixture(6)


@pytest.mark.requires_capability("sliding_window")
@pytest.mark.parametrize("window", [1, 16, 50])
def test_windows(base: dict[str, Any], window: int) -> None:
    Case(**base, layer=spec(window=window), seed=10).mixture(14)


@pytest.mark.requires_capability("logit_softcap")
def test_soft_caps(base: dict[str, Any]) -> None:
    Case(**base, layer=spec(softcap=2.0), seed=11).mixture(8)


@pytest.mark.requires_capability("sliding_window", "logit_softcap")
def test_a_window_and_a_soft_cap_together(base: dict[str, Any]) -> None:
    Case(**base, layer=spec(softcap=2.0, window=24), seed=12).mixture(8)


@pytest.mark.mandatory
def test_rows_that_share_a_prefix_read_the_same_blocks(base: dict[str, Any]) -> None:
    case = Case(**base, layer=spec(), seed=13)
    size = case.block_size
    case.step({0: min(4 * size, 300, case.limits.max_tokens - 1) // size * size + 1})
    whole = case.computed(0) // size * size
    for row in range(1, min(case.rows, 4)):
        case.step({row: 1 + 3 * (row - 1)}, shared={row: (0, whole)})
    rows = range(min(case.rows, 4))
    for _ in range(3):
        case.step(dict.fromkeys(rows, 1))


@pytest.mark.mandatory
def test_keys_and_values_stay_where_they_were_written(base: dict[str, Any]) -> None:
    """Another sequence's writes, and a new sequence in used blocks, leave a row's own as they are."""
    case = Case(**base, layer=spec(), seed=14)
    last = case.rows - 1
    case.step({0: min(40, case.limits.max_tokens)})
    for round_ in range(3):
        case.step({last: min(70, case.limits.max_tokens)})
        case.step({0: 1})
        case.step({last: 1})
        if round_ < 2:
            case.forget(last)
    case.step({0: 1})


@pytest.mark.mandatory
def test_block_bytes_is_what_a_block_takes(base: dict[str, Any]) -> None:
    attention = base["device"].parts.attention
    layer, size, kv_dtype = spec(), base["block_size"], base["kv_dtype"]
    least = 2 * size * layer.kv_heads * layer.head_dim * getattr(torch, kv_dtype).itemsize
    one = attention.block_bytes(layer, size, kv_dtype)
    assert least <= one <= 2 * least, f"a block of {size} tokens holds {least} bytes of numbers; block_bytes says {one}"
    assert attention.block_bytes(spec(12, 4), size, kv_dtype) >= 2 * least


def test_a_cache_that_cannot_fit_is_out_of_memory(base: dict[str, Any]) -> None:
    limits = Limits(
        max_rows=1, max_tokens=64, max_model_len=64, block_size=base["block_size"], num_blocks=2**42, vocab_size=64
    )
    device: DeviceUnderTest = base["device"]
    with pytest.raises(OutOfMemory):
        device.run(lambda: device.parts.attention.allocate([spec()], limits, base["kv_dtype"]))


def test_an_unknown_kv_dtype_is_unsupported(base: dict[str, Any]) -> None:
    limits = Limits(
        max_rows=1, max_tokens=64, max_model_len=64, block_size=base["block_size"], num_blocks=4, vocab_size=64
    )
    device: DeviceUnderTest = base["device"]
    with pytest.raises(Unsupported):
        device.run(lambda: device.parts.attention.allocate([spec()], limits, "float7_e3m3"))


@pytest.mark.parametrize(
    ("capability", "layer"),
    [("sliding_window", spec(window=16)), ("logit_softcap", spec(softcap=2.0))],
    ids=["sliding_window", "logit_softcap"],
)
def test_what_is_not_declared_is_never_computed_wrongly(
    base: dict[str, Any], capability: str, layer: AttentionSpec
) -> None:
    """Unsupported, or right all the same."""
    if base["device"].declares(capability):
        return
    with contextlib.suppress(Unsupported):
        Case(**base, layer=layer, seed=15).mixture(10)
