"""Attention over a cache of 8 bits beside one of 16, and log-probabilities beside torch's, on the card at hand.

    python benchmarks/h100_eight_bit.py --out h100_eight_bit.json

Microseconds of one call within a captured graph, as in ``gpu_kernels.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import DECODE_SHAPES, VOCAB, AttentionBench, arch, random, timed_us
from gpu_kernels import Timed as Work

from isthmus_triton.kernels.logprobs import log_probabilities
from isthmus_triton.launch import DecodeLaunch, PrefillLaunch, launch_table

EIGHT_BITS = "float8_e4m3fn"
BLOCK_SIZES = (16, 64)
DECODE = tuple(
    DecodeLaunch(key_tile=tile, stages=stages, warps=4, programs_per_unit=units, least_tiles=4)
    for tile, stages in ((64, 3), (64, 4), (64, 5), (128, 2), (128, 3))
    for units in (2, 3, 4)
)
PREFILL = tuple(
    PrefillLaunch(query_tile=128, key_tile=tile, stages=stages, warps=8)
    for tile, stages in ((64, 2), (64, 3), (64, 4), (128, 2))
)
SPANS = ((1, 0, 8192), (1, 8192, 8192), (32, 0, 202))


def decode() -> Iterator[dict[str, Any]]:
    table = launch_table(arch())
    own = ("bfloat16", table.decode_for(256))
    for kv_dtype, launch in (own, *((EIGHT_BITS, launch) for launch in DECODE)):
        for block_size in BLOCK_SIZES:
            for batch, context in DECODE_SHAPES:
                layers = max(2, min(32, 2**29 // (batch * context * 4096)))
                taken = replace(table, decode=((256, launch),))
                bench = AttentionBench(taken, block_size, batch, context - 1, 1, layers, kv_dtype)
                us = timed_us(Work(bench.calls()))
                moved = batch * context * 4096 // (2 if kv_dtype == EIGHT_BITS else 1)
                yield {
                    "kernel": "decode", "kv_dtype": kv_dtype, "block": block_size, "batch": batch, "context": context,
                    **asdict(launch), "us": round(us, 2), "tb_s": round(moved / us / 1e6, 3),
                }  # fmt: skip


def prefill() -> Iterator[dict[str, Any]]:
    table = launch_table(arch())
    own = ("bfloat16", table.prefill_for(256))
    for kv_dtype, launch in (own, *((EIGHT_BITS, launch) for launch in PREFILL)):
        for batch, start, length in SPANS:
            taken = replace(table, prefill=((256, launch),))
            us = timed_us(Work(AttentionBench(taken, 16, batch, start, length, 3, kv_dtype).calls()))
            pairs = batch * sum(range(start + 1, start + length + 1))
            yield {
                "kernel": "prefill", "kv_dtype": kv_dtype, "batch": batch, "start": start, "length": length,
                **asdict(launch), "us": round(us, 2), "tflop_s": round(4.0 * 32 * 128 * pairs / us / 1e6, 1),
            }  # fmt: skip


def by_torch(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> None:
    """As the reference does it."""
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    own = logits.gather(1, tokens.long()[:, None])
    top, ids = torch.topk(logits, count, dim=-1)
    _ = own - normaliser, (logits > own).sum(dim=-1).int() + 1, ids.int(), top - normaliser


def logprobs() -> Iterator[dict[str, Any]]:
    for batch in (1, 32, 256):
        logits = random(batch, VOCAB, dtype=torch.float32, scale=4.0)
        tokens = torch.zeros(batch, dtype=torch.int32, device=logits.device)
        for count in (0, 5, 20):
            for name, function in (("triton", log_probabilities), ("torch", by_torch)):
                us = timed_us(Work([partial(function, logits, tokens, count)] * 4))
                yield {"kernel": "logprobs", "by": name, "batch": batch, "count": count, "us": round(us, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("h100_eight_bit.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for cases in (logprobs(), decode(), prefill()):
        for row in cases:
            print(row, flush=True)
            rows.append(row)
            result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
            arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
