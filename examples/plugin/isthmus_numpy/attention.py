"""Paged attention: the KV cache's layout, and everything that reads or writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.contract import AttentionSpec, Limits, QkNorm, RotarySpec, StepInputs
from isthmus.errors import OutOfMemory, Unsupported


@dataclass
class Cache:
    """One layer.  A slot is ``block * block_size + offset``."""

    keys: np.ndarray[Any, Any]  # [slots, kv_heads, head_dim]
    values: np.ndarray[Any, Any]  # [slots, kv_heads, head_dim]
    block_size: int


class NumpyAttention:
    def block_bytes(self, layer: AttentionSpec, block_size: int, kv_dtype: str) -> int:
        return 2 * block_size * layer.kv_heads * layer.head_dim * 4

    def allocate(self, layers: Sequence[AttentionSpec], limits: Limits, kv_dtype: str) -> list[Cache]:
        if kv_dtype != "float32":
            raise Unsupported(f"backend 'numpy' keeps keys and values as float32, not {kv_dtype}")
        if any(layer.softcap for layer in layers):
            raise Unsupported("backend 'numpy' does not cap attention scores")
        slots = limits.num_blocks * limits.block_size
        try:
            shapes = [(slots, layer.kv_heads, layer.head_dim) for layer in layers]
            return [
                Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32), limits.block_size) for shape in shapes
            ]
        except (MemoryError, ValueError) as error:
            raise OutOfMemory(f"the KV cache of {limits.num_blocks} blocks does not fit; ask for fewer") from error

    def plan(self, inputs: StepInputs) -> list[tuple[slice, int, int]]:
        """Each span's tokens in the step, its row and its context; padded spans hold no token."""
        starts = inputs.query_starts.numpy()
        spans = zip(starts, starts[1:], inputs.span_rows.numpy(), inputs.context_lengths.numpy(), strict=False)
        return [(slice(begin, end), row, context) for begin, end, row, context in spans if end > begin]

    def rotate_and_store(
        self,
        qkv: Tensor,
        cache: Cache,
        layer: AttentionSpec,
        rotary: RotarySpec,
        qk_norm: QkNorm | None,
        inputs: StepInputs,
    ) -> Tensor:
        heads = qkv.numpy().reshape(len(qkv), -1, layer.head_dim)
        query, key, value = np.split(heads, [layer.heads, layer.heads + layer.kv_heads], axis=1)
        if qk_norm is not None:
            query = rms_norm(query, qk_norm.query_weight.numpy(), qk_norm.epsilon)
            key = rms_norm(key, qk_norm.key_weight.numpy(), qk_norm.epsilon)
        cos_sin = rotary.cos_sin.numpy()[inputs.positions.numpy()][:, None]
        slots = inputs.slots.numpy()
        cache.keys[slots] = rotate(key, cos_sin)
        cache.values[slots] = value
        return torch.from_numpy(rotate(query, cos_sin))

    def attend(
        self, query: Tensor, cache: Cache, layer: AttentionSpec, plan: list[tuple[slice, int, int]], inputs: StepInputs
    ) -> Tensor:
        group, size = layer.heads // layer.kv_heads, cache.block_size
        out = np.zeros(query.shape, np.float32)
        for tokens, row, context in plan:
            blocks = inputs.block_tables[row, : -(-context // size)].numpy()
            slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)[:context]
            keys, values = cache.keys[slots], cache.values[slots]  # [context, kv_heads, head_dim]
            queries = query[tokens].numpy() * np.float32(layer.scale)
            grouped = queries.reshape(len(queries), layer.kv_heads, group, layer.head_dim)
            scores = np.einsum("qhgd,khd->hgqk", grouped, keys)
            position = np.arange(context - len(queries), context)[:, None]
            seen = np.arange(context) <= position
            if layer.window:
                seen &= np.arange(context) > position - layer.window
            weights = softmax(np.where(seen, scores, np.float32(-np.inf)))
            out[tokens] = np.einsum("hgqk,khd->qhgd", weights, values).reshape(queries.shape)
        return torch.from_numpy(out.reshape(len(out), -1))


def rms_norm(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], epsilon: float) -> np.ndarray[Any, Any]:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(epsilon)) * weight)


def rotate(x: np.ndarray[Any, Any], cos_sin: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Half-split order: dimension i turns with dimension i + half."""
    cos, sin = np.split(cos_sin, 2, axis=-1)
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), -1)


def softmax(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))
