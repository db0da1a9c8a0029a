"""A mixture of experts by grouped products beside the plain reference, on the card at hand.

    python benchmarks/gpu_experts.py --out gpu_experts.json

One layer's experts in bf16, over random weights of a fixed seed and a router that spreads its tokens:
ours as a captured graph, the reference eagerly, since it waits for the device.  Microseconds, the
median and the spread of the replays; the bound is the larger of the weights and rows at the memory's
rate (3.03 TB/s) and the products at 737 TFLOP/s, the figures of an H100.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_kernels import arch, device, random, times_us

from isthmus.reference import ReferenceOps
from isthmus_triton.launch import launch_table
from isthmus_triton.ops import TritonOps

SHAPES = {  # experts, chosen of them, hidden, inner
    "Mixtral 8x7B": (8, 2, 4096, 14336),
    "Qwen3 30B": (128, 8, 2048, 768),
}
TOKENS = (1, 16, 64, 256, 1024, 8192)
BYTES_A_SECOND, FLOPS_A_SECOND = 3.03e12, 737e12


def bound_us(shape: tuple[int, int, int, int], tokens: int, used: int) -> float:
    _, top_k, hidden, inner = shape
    weights = used * 3 * hidden * inner * 2
    flops = 2 * 3 * hidden * inner * tokens * top_k
    return round(max(weights / BYTES_A_SECOND, flops / FLOPS_A_SECOND) * 1e6, 1)


def measured(name: str) -> list[dict[str, Any]]:
    shape = experts, top_k, hidden, inner = SHAPES[name]
    torch.manual_seed(0)

    def weight(*sizes: int) -> torch.Tensor:
        return random(*sizes, scale=sizes[-1] ** -0.5)

    ours, reference = TritonOps(device(), launch_table(arch())), ReferenceOps(device())
    weights = ours.prepare_experts(weight(experts, 2 * inner, hidden), weight(experts, hidden, inner))
    records = []
    for tokens in TOKENS:
        x, router = weight(tokens, hidden) * hidden**0.5, weight(tokens, experts) * experts**0.5
        options: dict[str, Any] = {"top_k": top_k, "renormalize": True, "activation": "silu"}
        expected = reference.experts(x, router, weights, **options)
        error = (ours.experts(x, router, weights, **options) - expected).abs().max().item()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                ours.experts(x, router, weights, **options)
        graph.replay()
        found = [us / 8 for us in times_us(graph.replay, 9)]
        plain = times_us(lambda x=x, r=router, o=options: reference.experts(x, r, weights, **o), 5)
        used = router.topk(top_k, dim=-1).indices.unique().numel()
        record = {
            "model": name,
            "tokens": tokens,
            "us": round(median(found), 1),
            "spread": round((found[-1] - found[0]) / median(found), 3),
            "reference_us": round(median(plain), 1),
            "bound_us": bound_us(shape, tokens, used),
            "largest_difference": error,
        }
        print(record, flush=True)
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_experts.json"))
    arguments = parser.parse_args()
    with torch.inference_mode():
        records = [record for name in SHAPES for record in measured(name)]
    arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
