"""Loads a model: checkpoint tensors go straight to their place in a weight, and the weight to the backend.

At most one weight, and what the backend makes of it, exists besides those already prepared.
"""

from __future__ import annotations

import math
import sys
from typing import Final, Protocol

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from isthmus.contract.parts import Backend, QkNorm, RotarySpec
from isthmus.errors import ModelError, OutOfMemory
from isthmus.model import config, gguf_config
from isthmus.model.checkpoint import Checkpoint, open_checkpoint
from isthmus.model.decoder import Decoder, Ends, Experts, Layer, Mlp
from isthmus.model.layout import LayerLayout, Layout, Weight, check, layout_of
from isthmus.model.names import WeightNames
from isthmus.model.rope import cos_sin_table
from isthmus.model.source import ModelSource
from isthmus.model.spec import LayerSpec, ModelSpec

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RANDOM_SEED: Final = 0

LOG_INTERVAL_S: Final = 10.0
"""Between lines of progress where they go to a log."""


def load_decoder(
    source: ModelSource,
    spec: ModelSpec,
    backend: Backend,
    dtype: str,
    max_positions: int,
    *,
    random_weights: bool = False,
    progress: bool = True,
) -> Decoder:
    """Load ``spec``'s weights onto ``backend.memory.device`` as ``dtype`` and hand each to ``backend.ops``.

    Rotary tables reach ``max_positions``.  ``random_weights`` reads no weight file.  ``progress`` draws a bar on
    standard error.  Raises :class:`ModelError` naming the file and tensor that is missing, cut off, unknown or of
    a wrong shape; all are looked for before the first is read.  Raises :class:`OutOfMemory`.
    """
    if dtype not in DTYPES:
        raise ModelError(f"the dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    weight_names = _names(source, spec)
    if random_weights:
        layout = layout_of(spec, weight_names, ())
        return _load(spec, backend, RandomFiller(backend.memory.device), dtype, layout, max_positions)
    checkpoint = open_checkpoint(source)
    try:
        layout = layout_of(spec, weight_names, checkpoint.shapes.keys())
        check(layout, weight_names, checkpoint.shapes, checkpoint.where, spec.tied_embeddings)
        total = sum(checkpoint.nbytes(part.name) for part in layout.parts())
        with tqdm(
            total=total,
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            disable=not progress,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else LOG_INTERVAL_S,
        ) as bar:
            return _load(spec, backend, CheckpointFiller(checkpoint, bar), dtype, layout, max_positions)
    finally:
        checkpoint.close()


def _load(spec: ModelSpec, backend: Backend, filler: Filler, dtype: str, layout: Layout, max_positions: int) -> Decoder:
    """Load, unless it cannot fit; running out on the way is the same error."""
    needed = sum(math.prod(part.shape) for part in layout.parts()) * DTYPES[dtype].itemsize
    total = backend.memory.total_bytes()
    advice = "take a smaller model, or a shorter dtype"
    if 0 < total < needed:
        raise OutOfMemory(
            f"the weights take {needed / 1e9:.1f} GB as {dtype}; the device has {total / 1e9:.1f} GB: {advice}"
        )
    try:
        return _Loader(spec, backend, filler, DTYPES[dtype]).load(layout, max_positions)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the weights take {needed / 1e9:.1f} GB as {dtype}; the device ran out of memory: {advice}"
        ) from error


def _names(source: ModelSource, spec: ModelSpec) -> WeightNames:
    if source.kind == "safetensors":
        return config.ARCHITECTURES[spec.architecture].names
    return gguf_config.names_of(spec.architecture)


class Filler(Protocol):
    def fill(self, destination: Tensor, weight: Weight) -> None:
        """Write all of ``destination``, which has the weight's shape."""
        ...

    def norm_offset(self, spec: ModelSpec) -> float:
        """What to add to a norm's weights after they are filled."""
        ...


class CheckpointFiller:
    """Reads parts into their places."""

    def __init__(self, checkpoint: Checkpoint, bar: tqdm) -> None:
        self._checkpoint = checkpoint
        self._bar = bar

    def norm_offset(self, spec: ModelSpec) -> float:
        return spec.norm_offset

    def fill(self, destination: Tensor, weight: Weight) -> None:
        for part in weight.parts:
            self._checkpoint.read_into(destination[part.at], part)
            self._bar.update(self._checkpoint.nbytes(part.name))


class RandomFiller:
    """Matrices normal, with the deviation that keeps activations of unit size; biases 0, norms 1.

    Made on the device, from a fixed seed.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device=device).manual_seed(RANDOM_SEED)

    def norm_offset(self, _spec: ModelSpec) -> float:
        return 1.0

    def fill(self, destination: Tensor, weight: Weight) -> None:
        if len(weight.shape) == 1:
            destination.zero_()
        else:
            destination.normal_(0.0, weight.shape[-1] ** -0.5, generator=self._generator)


class _Loader:
    """Makes each weight and hands it over."""

    def __init__(self, spec: ModelSpec, backend: Backend, filler: Filler, dtype: torch.dtype) -> None:
        self.spec = spec
        self.ops = backend.ops
        self.attention = backend.attention
        self.device = backend.memory.device
        self.filler = filler
        self.dtype = dtype

    def load(self, layout: Layout, max_positions: int) -> Decoder:
        if layout.head is None:
            table, head = self.ops.prepare_embedding(self._tensor(layout.embedding))
        else:
            table = self.ops.prepare_table(self._tensor(layout.embedding))
            head = self.ops.prepare_linear(self._tensor(layout.head))
        ropes = [
            RotarySpec(cos_sin=cos_sin_table(rope, max_positions, self.device), rotary_dim=rope.rotary_dim)
            for rope in self.spec.ropes
        ]
        ends = Ends(
            table=table,
            embedding_scale=self._in_dtype(self.spec.embedding_scale),
            final_norm=self._norm(layout.final_norm),
            head=head,
        )
        layers = [
            self._layer(layer, part, ropes[layer.rope])
            for layer, part in zip(self.spec.layers, layout.layers, strict=True)
        ]
        return Decoder(self.spec, ends, layers, self.ops, self.attention)

    def _layer(self, spec: LayerSpec, layout: LayerLayout, rotary: RotarySpec) -> Layer:
        return Layer(
            attention=spec.attention,
            rotary=rotary,
            attention_norm=self._norm(layout.attention_norm),
            qkv=self.ops.prepare_linear(self._tensor(layout.qkv), self._optional(layout.qkv_bias)),
            qk_norm=self._qk_norm(layout),
            output=self.ops.prepare_linear(self._tensor(layout.output), self._optional(layout.output_bias)),
            post_attention_norm=self._optional_norm(layout.post_attention_norm),
            mlp_norm=self._norm(layout.mlp_norm),
            mlp=self._mlp(layout),
            experts=self._experts(spec, layout),
            post_mlp_norm=self._optional_norm(layout.post_mlp_norm),
        )

    def _qk_norm(self, layout: LayerLayout) -> QkNorm | None:
        if layout.query_norm is None or layout.key_norm is None:
            return None
        return QkNorm(
            query_weight=self._norm(layout.query_norm),
            key_weight=self._norm(layout.key_norm),
            epsilon=self.spec.norm_epsilon,
        )

    def _mlp(self, layout: LayerLayout) -> Mlp | None:
        if layout.gate_up is None or layout.down is None:
            return None
        return Mlp(
            gate_up=self.ops.prepare_linear(self._tensor(layout.gate_up), self._optional(layout.gate_up_bias)),
            down=self.ops.prepare_linear(self._tensor(layout.down), self._optional(layout.down_bias)),
        )

    def _experts(self, spec: LayerSpec, layout: LayerLayout) -> Experts | None:
        if spec.experts is None:
            return None
        assert layout.router and layout.expert_gate_up and layout.expert_down
        return Experts(
            router=self.ops.prepare_linear(self._tensor(layout.router)),
            weights=self.ops.prepare_experts(self._tensor(layout.expert_gate_up), self._tensor(layout.expert_down)),
            top_k=spec.experts.top_k,
            renormalize=spec.experts.renormalize,
        )

    def _tensor(self, weight: Weight) -> Tensor:
        tensor = torch.empty(weight.shape, dtype=self.dtype, device=self.device)
        self.filler.fill(tensor, weight)
        return tensor

    def _optional(self, weight: Weight | None) -> Tensor | None:
        return None if weight is None else self._tensor(weight)

    def _norm(self, weight: Weight) -> Tensor:
        """In float32 from the start: an offset added in a shorter dtype would round."""
        tensor = torch.empty(weight.shape, dtype=torch.float32, device=self.device)
        self.filler.fill(tensor, weight)
        return self.ops.prepare_norm(tensor.add_(self.filler.norm_offset(self.spec)))

    def _optional_norm(self, weight: Weight | None) -> Tensor | None:
        return None if weight is None else self._norm(weight)

    def _in_dtype(self, value: float) -> float:
        """Rounded to the compute dtype, as checkpoints were trained (Gemma's embedding scale)."""
        return float(torch.tensor(value, dtype=self.dtype))
