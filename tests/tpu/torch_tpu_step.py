"""A paged decode step in torch on torch_tpu's own device, whose client is XLA's CPU one; prints figures as JSON.

Run with REAL_PJRT and TPU_LIBRARY_PATH as conftest.py sets them.  ``--stablehlo FILE`` writes the
program that torch_tpu made of a larger step in bfloat16, for the TPU compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_tpu._loader
from torch import Tensor

from isthmus_tpu.in_place import compiler as in_place_backend

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 128, 16
MAX_BLOCKS = 4
WIDTH = KV_HEADS * DIM


def make_weights(layers: int, hidden: int, inner: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    layer = [
        {
            "qkv": weight((HEADS + 2 * KV_HEADS) * DIM, hidden),
            "out": weight(hidden, HEADS * DIM),
            "gate_up": weight(2 * inner, hidden),
            "down": weight(hidden, inner),
        }
        for _ in range(layers)
    ]
    angles = torch.arange(1024)[:, None] * 10000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    return {"layers": layer, "embedding": weight(vocab, hidden), "cos_sin": table}


def norm(x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def step(
    tokens: Tensor,  # int32 [rows]
    positions: Tensor,  # int32 [rows]
    slots: Tensor,  # int32 [rows]
    tables: Tensor,  # int32 [rows, MAX_BLOCKS]
    caches: list[tuple[Tensor, Tensor]],  # each [slots, WIDTH]
    weights: dict[str, Any],
) -> Tensor:
    rows = tokens.shape[0]
    x = weights["embedding"].index_select(0, tokens)
    cos, sin = weights["cos_sin"].index_select(0, positions)[:, None].chunk(2, dim=-1)
    offsets = torch.arange(BLOCK, device=tokens.device, dtype=torch.int32)
    places = (tables[:, :, None] * BLOCK + offsets).flatten()
    seen = torch.arange(MAX_BLOCKS * BLOCK, device=tokens.device)[None] <= positions[:, None]
    for layer, (keys, values) in zip(weights["layers"], caches, strict=True):
        qkv = (norm(x) @ layer["qkv"].T).view(rows, -1, DIM)
        query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        keys.index_copy_(0, slots.long(), key.reshape(rows, WIDTH))
        values.index_copy_(0, slots.long(), value.reshape(rows, WIDTH))
        held, read = (cache.index_select(0, places).view(rows, -1, KV_HEADS, DIM) for cache in (keys, values))
        scores = torch.einsum("rhgd,rkhd->rhgk", query.reshape(rows, KV_HEADS, -1, DIM), held).float() * DIM**-0.5
        share = scores.masked_fill(~seen[:, None, None], -1e30).softmax(-1).to(x.dtype)
        attended = torch.einsum("rhgk,rkhd->rhgd", share, read).reshape(rows, -1)
        x = x + attended @ layer["out"].T
        gate, up = (norm(x) @ layer["gate_up"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ layer["down"].T
    return (norm(x) @ weights["embedding"].T).float().argmax(-1).int()


def move(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, dict):
        return {name: move(leaf, device) for name, leaf in tree.items()}
    return [move(leaf, device) for leaf in tree] if isinstance(tree, list) else tree.to(device)


def make_caches(layers: int, blocks: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    shape = (blocks * BLOCK, WIDTH)
    return [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)) for _ in range(layers)]  # type: ignore[misc]


def generate(function: Callable[..., Tensor], weights: Any, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of 20 steps, and the first layer's keys after them."""
    weights = move(weights, device)
    caches = make_caches(len(weights["layers"]), 64, torch.float32, device)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1))[: rows * MAX_BLOCKS] + 1
    tables = order.view(rows, MAX_BLOCKS).int()
    tokens, seen = (torch.arange(rows) + 5).int().to(device), []
    for position in range(20):
        slots = tables[:, position // BLOCK] * BLOCK + position % BLOCK
        positions = torch.full((rows,), position, dtype=torch.int32)
        tokens = function(tokens, positions.to(device), slots.to(device), tables.to(device), caches, weights)
        seen.append(tokens.cpu())
    return torch.stack(seen), caches[0][0].cpu()


def numerics(function: Callable[..., Tensor], tpu: torch.device, rows: int) -> dict[str, Any]:
    weights = make_weights(layers=2, hidden=128, inner=256, vocab=512, dtype=torch.float32)
    want, want_keys = generate(step, weights, rows, torch.device("cpu"))
    got, keys = generate(function, weights, rows, tpu)
    error = float((keys - want_keys).abs().max())
    return {"rows": rows, "tokens_equal": torch.equal(want, got), "distinct": len(want.unique()), "key_error": error}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost_of_an_update(backend: Any, tpu: torch.device, cache_bytes: int) -> dict[str, float]:
    """Seconds of a step that writes two slots of a large cache, and what it added to the process's peak."""

    def write(cache: Tensor, slots: Tensor, new: Tensor) -> Tensor:
        cache.index_copy_(0, slots, new)
        return cache.index_select(0, slots).sum()

    cache = torch.zeros(cache_bytes // (4 * WIDTH), WIDTH, device=tpu)
    slots, new = torch.tensor([3, 5]).to(tpu), torch.ones(2, WIDTH).to(tpu)
    compiled = torch.compile(write, backend=backend, fullgraph=True, dynamic=False)
    cache.add_(1.0)  # touches the pages
    cache[:1].cpu()
    before, seconds = peak_bytes(), []
    for _ in range(4):
        began = time.perf_counter()
        compiled(cache, slots, new).cpu()
        seconds.append(time.perf_counter() - began)
    assert float(cache[3].cpu().sum()) == WIDTH
    return {"seconds": min(seconds[1:]), "peak_bytes": peak_bytes() - before}


def refusal(tpu: torch.device) -> str:
    function = torch.compile(lambda x: x[x > 0], backend=in_place_backend([]), fullgraph=True, dynamic=False)
    try:
        function(torch.randn(8).to(tpu))
    except Exception as error:  # the name of the class is the figure
        return type(error).__name__
    return ""


def large_step(tpu: torch.device) -> tuple[str, dict[str, int]]:
    """StableHLO of a step with 2 layers of hidden size 1024 in bfloat16, donations as torch_tpu wrote them."""
    programs: list[Any] = []
    compiled = torch.compile(step, backend=in_place_backend(programs), fullgraph=True, dynamic=False)
    weights = move(make_weights(2, 1024, 2048, 4096, torch.bfloat16), tpu)
    caches = make_caches(2, 512, torch.bfloat16, tpu)
    rows = [torch.zeros(4, dtype=torch.int32).to(tpu) for _ in range(3)]
    compiled(*rows, torch.zeros(4, MAX_BLOCKS, dtype=torch.int32).to(tpu), caches, weights)
    text: str = programs[0].stablehlo_forward_text[0]
    kv_bytes = sum(half.numel() * half.element_size() for pair in caches for half in pair)
    return text, {"kv_bytes": kv_bytes, "caches": 4, "donated": len(re.findall(r"jax.buffer_donor|tf.aliasing", text))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stablehlo", type=Path, required=True)
    torch.set_grad_enabled(False)
    # Private, and the reason that requirements.txt pins torch_tpu: a public load looks for a TPU on the PCI bus.
    tpu = torch_tpu._loader._init_device("tpu")

    programs: list[Any] = []
    in_place = torch.compile(step, backend=in_place_backend(programs), fullgraph=True, dynamic=False)
    shapes = [{**numerics(in_place, tpu, rows), "programs": len(programs)} for rows in (4, 8, 4)]
    stock = torch.compile(step, backend="tpu", fullgraph=True, dynamic=False)
    text, figures = large_step(tpu)
    parser.parse_args().stablehlo.write_text(text)
    cache_bytes = 256 * 2**20
    print(
        json.dumps(
            {
                "in_place": shapes,
                "stock": numerics(stock, tpu, 4),
                "refused": refusal(tpu),
                "cache_bytes": cache_bytes,
                "update_in_place": cost_of_an_update(in_place_backend([]), tpu, cache_bytes),
                "update_stock": cost_of_an_update("tpu", tpu, cache_bytes),
                "stablehlo": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
