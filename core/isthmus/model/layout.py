"""Which tensors of a checkpoint make up each weight of a model, and their shapes.  Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

from isthmus.errors import ModelError
from isthmus.model.names import WeightNames
from isthmus.model.spec import ExpertSpec, LayerSpec, ModelSpec

Shape = tuple[int, ...]
SHOWN = 4
"""Tensor names that an error lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of the checkpoint, and where it goes in the weight."""

    name: str
    shape: Shape
    at: tuple[int | slice, ...] = ()
    rotary_heads: int = 0
    """Rows are so many heads in interleaved rotary order, to be put in half-split order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """A layer's weights; ``None`` is absent."""

    attention_norm: Weight
    qkv: Weight
    qkv_bias: Weight | None = None
    query_norm: Weight | None = None
    key_norm: Weight | None = None
    output: Weight
    output_bias: Weight | None = None
    post_attention_norm: Weight | None = None
    mlp_norm: Weight
    gate_up: Weight | None = None
    gate_up_bias: Weight | None = None
    down: Weight | None = None
    down_bias: Weight | None = None
    router: Weight | None = None
    expert_gate_up: Weight | None = None
    expert_down: Weight | None = None
    post_mlp_norm: Weight | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    embedding: Weight
    head: Weight | None
    """``None``: the embedding serves (tied)."""
    final_norm: Weight
    layers: tuple[LayerLayout, ...]

    def parts(self) -> Iterator[Part]:
        """All tensors that the model needs, in no particular order."""
        owners: tuple[Layout | LayerLayout, ...] = (self, *self.layers)
        for owner in owners:
            for field in fields(owner):
                value = getattr(owner, field.name)
                if isinstance(value, Weight):
                    yield from value.parts


def layout_of(spec: ModelSpec, names: WeightNames, available: Collection[str]) -> Layout:
    """``available`` names the checkpoint's tensors: it decides between spellings, and whether they are tied."""
    prefix = names.prefix(available)
    head = names.head(available)
    vocabulary = (spec.vocab_size, spec.hidden)
    return Layout(
        embedding=_whole(f"{prefix}{names.embedding}.weight", vocabulary),
        head=None if spec.tied_embeddings else _whole(f"{head}.weight", vocabulary),
        final_norm=_whole(f"{prefix}{names.final_norm}.weight", (spec.hidden,)),
        layers=tuple(
            _Layer(spec, layer, names, prefix + names.layer.format(layer=i)).layout()
            for i, layer in enumerate(spec.layers)
        ),
    )


def check(layout: Layout, names: WeightNames, shapes: dict[str, Shape], where: str, tied: bool) -> None:
    """Raise :class:`ModelError` for a tensor that is missing, of a wrong shape, or of no known use."""
    parts = {part.name: part for part in layout.parts()}
    missing = [name for name in parts if name not in shapes]
    if missing:
        wanted = ", ".join(f"{name} {list(parts[name].shape)}" for name in missing[:SHOWN])
        raise ModelError(f"{where} lacks {len(missing)} tensors that the model needs: {wanted}{_more(missing)}")
    for name, part in parts.items():
        if shapes[name] != part.shape:
            raise ModelError(
                f"{where}: tensor {name} has the shape {list(shapes[name])}; the config makes it {list(part.shape)}"
            )
    ignored = [re.compile(pattern) for pattern in names.ignored]
    spare = set(names.heads) if tied else set()
    unknown = [
        name
        for name in shapes
        if name not in parts and name.removesuffix(".weight") not in spare and not any(p.search(name) for p in ignored)
    ]
    if unknown:
        raise ModelError(
            f"{where} holds {len(unknown)} tensors that this architecture has no use for: "
            f"{', '.join(unknown[:SHOWN])}{_more(unknown)}; the model would not be computed as it was made"
        )


def _more(found: list[str]) -> str:
    return f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""


def _whole(name: str, shape: Shape) -> Weight:
    return Weight(shape=shape, parts=(Part(name=name, shape=shape),))


def _merged(named: list[tuple[str, int, int]], rest: Shape) -> Weight:
    """Tensors (name, rows, rotary heads) one after another along the first dimension."""
    parts, row = [], 0
    for name, rows, rotary_heads in named:
        parts.append(Part(name=name, shape=(rows, *rest), at=(slice(row, row + rows),), rotary_heads=rotary_heads))
        row += rows
    return Weight(shape=(row, *rest), parts=tuple(parts))


class _Layer:
    """Lays out one layer."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, names: WeightNames, prefix: str) -> None:
        self.spec = spec
        self.layer = layer
        self.names = names
        self.prefix = prefix

    def layout(self) -> LayerLayout:
        spec, names, attention = self.spec, self.names, self.layer.attention
        width = attention.heads * attention.head_dim
        mlp = self._dense() if self.layer.experts is None else self._experts(self.layer.experts)
        attention_norm, mlp_norm = self._norm(names.attention_norm), self._norm(names.mlp_norm)
        assert attention_norm is not None and mlp_norm is not None
        return LayerLayout(
            attention_norm=attention_norm,
            qkv=self._qkv("weight", (spec.hidden,)),
            qkv_bias=self._qkv("bias", ()) if spec.qkv_bias else None,
            query_norm=self._norm(names.query_norm, attention.head_dim) if spec.qk_norm else None,
            key_norm=self._norm(names.key_norm, attention.head_dim) if spec.qk_norm else None,
            output=self._one(names.output, "weight", (spec.hidden, width)),
            output_bias=self._one(names.output, "bias", (spec.hidden,)) if spec.output_bias else None,
            post_attention_norm=self._norm(names.post_attention_norm) if spec.post_norms else None,
            mlp_norm=mlp_norm,
            post_mlp_norm=self._norm(names.post_mlp_norm) if spec.post_norms else None,
            **mlp,
        )

    def _one(self, name: str, kind: str, shape: Shape) -> Weight:
        return _whole(f"{self.prefix}{name}.{kind}", shape)

    def _norm(self, name: str, size: int = 0) -> Weight | None:
        return self._one(name, "weight", (size or self.spec.hidden,)) if name else None

    def _qkv(self, kind: str, rest: Shape) -> Weight:
        attention = self.layer.attention
        heads = (attention.heads, attention.kv_heads, attention.kv_heads)
        rows = [count * attention.head_dim for count in heads]
        if len(self.names.qkv) == 1:
            return self._one(self.names.qkv[0], kind, (sum(rows), *rest))
        turned = (heads[0], heads[1], 0) if self.names.interleaved_rotary else (0, 0, 0)
        return _merged(
            [(f"{self.prefix}{n}.{kind}", r, t) for n, r, t in zip(self.names.qkv, rows, turned, strict=True)], rest
        )

    def _dense(self) -> dict[str, Weight]:
        spec, names = self.spec, self.names
        found = {
            "gate_up": self._gate_up("weight", (spec.hidden,)),
            "down": self._one(names.down, "weight", (spec.hidden, spec.inner)),
        }
        if spec.mlp_bias:
            found["gate_up_bias"] = self._gate_up("bias", ())
            found["down_bias"] = self._one(names.down, "bias", (spec.hidden,))
        return found

    def _gate_up(self, kind: str, rest: Shape) -> Weight:
        rows = 2 * self.spec.inner // len(self.names.gate_up)
        return _merged([(f"{self.prefix}{name}.{kind}", rows, 0) for name in self.names.gate_up], rest)

    def _experts(self, experts: ExpertSpec) -> dict[str, Weight]:
        hidden, count, inner = self.spec.hidden, experts.num_experts, experts.inner
        up = tuple(
            part
            for i, name in enumerate(self.names.expert_gate_up)
            for part in self._each_expert(name, count, (inner, hidden), (slice(i * inner, (i + 1) * inner),))
        )
        return {
            "router": self._one(self.names.router, "weight", (count, hidden)),
            "expert_gate_up": Weight(shape=(count, 2 * inner, hidden), parts=up),
            "expert_down": Weight(
                shape=(count, hidden, inner),
                parts=tuple(self._each_expert(self.names.expert_down, count, (hidden, inner), ())),
            ),
        }

    def _each_expert(self, name: str, count: int, shape: Shape, at: tuple[slice, ...]) -> Iterator[Part]:
        full = f"{self.prefix}{name}.weight"
        if "{expert}" not in name:
            yield Part(name=full, shape=(count, *shape), at=(slice(None), *at))
            return
        for expert in range(count):
            yield Part(name=full.format(expert=expert), shape=shape, at=(expert, *at))
