"""The offline engine on the shape of Llama-3.1-8B with random weights, beside vLLM's figures for one H100.

    python benchmarks/h100_llama8b.py --out h100_llama8b.json [--plot h100_llama8b.png] [--runs 2]

Greedy, exact output lengths, fixed seeds, the best of the runs; each run has prompts of its own, so
that no run finds another's prefixes cached.  "estimate" is arithmetic: weights and KV at the card's
copy bandwidth, products at the matrix library's measured rate, prefill attention at 600 TFLOP/s.
On another card only our own figures are given.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MAX_MODEL_LEN = 17408
Requests = Callable[[np.random.Generator], list[tuple[list[int], int]]]
"""(prompt, output tokens) pairs."""


@dataclass(frozen=True)
class Workload:
    name: str
    theirs_s: float  # vLLM 0.26.0, best of two runs
    estimate_s: float
    requests: Requests


def tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, 128000, count).tolist()


def equal(batch: int, prompt: int, output: int) -> Requests:
    return lambda rng: [(tokens(rng, prompt), output) for _ in range(batch)]


def shared(
    batch: int, prefix: int, own: int, output: int
) -> Callable[[np.random.Generator], list[tuple[list[int], int]]]:
    def make(rng: np.random.Generator) -> list[tuple[list[int], int]]:
        common = tokens(rng, prefix)
        return [(common + tokens(rng, own), output) for _ in range(batch)]

    return make


def lognormal(rng: np.random.Generator, count: int, mean: float, most: int) -> list[int]:
    """Lengths of deviation 1 in the logarithm, cut at ``most``, scaled so that their mean is ``mean``."""
    z = rng.standard_normal(count)
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        lengths = np.clip(np.exp(middle + z), 1, most).astype(int)
        low, high = (middle, high) if lengths.mean() < mean else (low, middle)
    return lengths.tolist()


def mixed(rng: np.random.Generator) -> list[tuple[list[int], int]]:
    # Lengths of one seed, as every run must do the same work.
    fixed = np.random.default_rng(0)
    prompts, outputs = lognormal(fixed, 1000, 202, 1024), lognormal(fixed, 1000, 188, 1024)
    return [(tokens(rng, prompt), output) for prompt, output in zip(prompts, outputs, strict=True)]


WORKLOADS = [
    Workload("1 x (128, 256)", 1.737, 1.27, equal(1, 128, 256)),
    Workload("8 x (128, 256)", 1.803, 1.31, equal(8, 128, 256)),
    Workload("32 x (128, 256)", 1.974, 1.44, equal(32, 128, 256)),
    Workload("128 x (128, 256)", 2.869, 1.96, equal(128, 128, 256)),
    Workload("256 x (128, 256)", 4.05, 2.97, equal(256, 128, 256)),
    Workload("1,000 mixed", 20.87, 14.4, mixed),
    Workload("512 x (512, 512)", 24.94, 20.0, equal(512, 512, 512)),
    Workload("64 x (4,096 in, 1 out)", 6.39, 5.71, equal(64, 4096, 1)),
    Workload("8 x (16,384 in, 128 out)", 5.44, 4.91, equal(8, 16384, 128)),
    Workload("256 x (2,048 shared + 128, 64)", 2.48, 1.4, shared(256, 2048, 128, 64)),
]
THEIR_CARD = "H100"
THEIR_START_S = 65.0
THEIR_KV_TOKENS = 444_528


def open_8b(device: str = "cuda", layers: int = CONFIG["num_hidden_layers"], **options: Any) -> Any:
    """An engine of the 8B shape with random weights; fewer ``layers`` to try a script."""
    from isthmus import LLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        return LLM(folder, device=device, random_weights=True, skip_tokenizer_init=True, progress=False, **options)


def generate(llm: Any, requests: Sequence[tuple[list[int], int]]) -> float:
    from isthmus import SamplingParams

    params = [SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True) for _, output in requests]
    began = time.perf_counter()
    outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    elapsed = time.perf_counter() - began
    for output, (_, wanted) in zip(outputs, requests, strict=True):
        got = len(output.outputs[0].token_ids)
        assert got == wanted, f"{got} tokens instead of {wanted}: {output.outputs[0]}"
    return elapsed


def run_workload(llm: Any, workload: Workload, index: int, runs: int) -> dict[str, Any]:
    times, steps = [], []
    for run in range(runs):
        requests = workload.requests(np.random.default_rng((index, run)))
        before = llm.stats().steps
        times.append(generate(llm, requests))
        steps.append(llm.stats().steps - before)
    best = min(times)
    record = {
        "workload": workload.name,
        "ours_s": round(best, 3),
        "runs_s": [round(t, 3) for t in times],
        "steps": steps,
        "ms_per_step": round(1e3 * best / steps[times.index(best)], 3),
        "output_tok_s": round(sum(output for _, output in requests) / best),
        "input_tok_s": round(sum(len(prompt) for prompt, _ in requests) / best),
    }
    line = f"{workload.name:32s} ours {best:7.3f} s  {record['ms_per_step']:6.2f} ms/step"
    if THEIR_CARD in llm.ready.device_name:
        record |= {"theirs_s": workload.theirs_s, "estimate_s": workload.estimate_s}
        record["speedup"] = round(workload.theirs_s / best, 3)
        line += f"  theirs {workload.theirs_s:7.3f} s  estimate {workload.estimate_s:6.2f} s  x{record['speedup']:.2f}"
    print(line, flush=True)
    return record


def profile(llm: Any, batch: int, context: int, folder: Path) -> dict[str, Any]:
    """A trace of some decode steps: their kernels, and how much of the wall time the device was busy."""
    from isthmus.trace import DEVICE_CATEGORIES, tracing

    rng = np.random.default_rng(99 + batch)
    path = folder / f"trace_{batch}.json.gz"
    with tracing(llm, path) as trace:
        generate(llm, [(tokens(rng, context), 24) for _ in range(batch)])
    print(trace.text(), flush=True)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in DEVICE_CATEGORIES)
    # The second half is decode alone.
    middle = (spans[0][0] + spans[-1][0]) / 2
    totals: dict[str, list[float]] = {}
    for start, spent, name in spans:
        if start >= middle:
            totals.setdefault(name[:70], []).append(spent)
    top = sorted(((sum(v), len(v), k) for k, v in totals.items()), reverse=True)[:14]
    return {
        "batch": batch,
        "context": context,
        "busy": trace.decode_busy,
        "busy_with_prefill": trace.device_busy,
        "wall_us": round(trace.wall_s * 1e6),
        "host_s": trace.figures()["host_s"],
        "kernels": [{"name": k, "count": n, "us": round(s, 1), "each_us": round(s / n, 2)} for s, n, k in top],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("h100_llama8b.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", default="", help="comma-separated indices of workloads")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--profile", action="store_true", help="also record kernels of decode steps")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer, to try the script")
    arguments = parser.parse_args()
    began = time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d ms %(name)s: %(message)s")
    llm = open_8b(
        arguments.device,
        arguments.layers,
        max_model_len=MAX_MODEL_LEN,
        block_size=arguments.block_size,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    started_s = time.perf_counter() - began
    ready = llm.ready
    kv_tokens = ready.num_blocks * ready.block_size
    print(f"start {started_s:.1f} s; {kv_tokens} KV tokens; {ready}", flush=True)
    generate(llm, [(tokens(np.random.default_rng(5), 16), 4)])
    first_s = time.perf_counter() - began

    chosen = [int(i) for i in arguments.only.split(",")] if arguments.only else range(len(WORKLOADS))
    result: dict[str, Any] = {
        "device": ready.device_name,
        "start_s": round(started_s, 2),
        "first_answer_s": round(first_s, 2),
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "kv_tokens": kv_tokens,
        "limits": {"rows": ready.max_num_seqs, "tokens": ready.max_num_batched_tokens, "block": ready.block_size},
        "notes": list(ready.notes),
        "workloads": [],
        "profiles": [],
    }
    if THEIR_CARD in ready.device_name:
        result |= {"their_start_s": THEIR_START_S, "their_kv_tokens": THEIR_KV_TOKENS}
    for index in chosen:
        try:
            result["workloads"].append(run_workload(llm, WORKLOADS[index], index, arguments.runs))
        except Exception as error:  # the rest of the table is still worth having
            print(f"{WORKLOADS[index].name}: {type(error).__name__}: {error}"[:600], file=sys.stderr, flush=True)
            result["workloads"].append({"workload": WORKLOADS[index].name, "error": str(error)[:300]})
        arguments.out.write_text(json.dumps(result, indent=1))
    if arguments.profile:
        for batch, context in ((1, 128), (32, 256), (256, 256)):
            try:
                result["profiles"].append(profile(llm, batch, context, arguments.out.parent))
            except Exception as error:
                print(f"profile {batch}: {type(error).__name__}: {error}"[:600], file=sys.stderr, flush=True)
    done = [w for w in result["workloads"] if "speedup" in w]
    if done:
        result["geometric_mean_speedup"] = round(math.exp(sum(math.log(w["speedup"]) for w in done) / len(done)), 3)
        print("geometric mean of speed-ups:", result["geometric_mean_speedup"])
    arguments.out.write_text(json.dumps(result, indent=1))
    llm.close()
    if arguments.plot:
        plot(result, arguments.plot)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [w for w in result["workloads"] if "speedup" in w]
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(done) + 1.6))
    for offset, (key, label) in enumerate(
        (("theirs_s", "vLLM 0.26"), ("ours_s", "Isthmus"), ("estimate_s", "estimate"))
    ):
        axes.barh(
            [i + 0.27 * offset for i in range(len(done))],
            [w[key] / w["theirs_s"] for w in done],
            0.25,
            label=label,
        )
    axes.set_yticks([i + 0.27 for i in range(len(done))], [w["workload"] for w in done])
    axes.invert_yaxis()
    axes.set_xlabel(f"time as a share of vLLM's (less is better), {result['device']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
