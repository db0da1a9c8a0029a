"""Requests that arrive one after another at the 8B shape, with graphs of steps that hold prompts and without.

    python benchmarks/gpu_arrivals.py --out arrivals.json [--rates 5,20,40] [--seconds 6] [--plot arrivals.png]
    python benchmarks/gpu_arrivals.py --draw arrivals.json --plot arrivals.png

Arrivals are Poisson, prompts and outputs lognormal (means 100 and 64, at most 512 and 256 tokens), greedy,
random weights.  The two ways take turns in one engine, over the same arrivals; a turn of the other seed follows.
Seconds to the first token count from the arrival, and between tokens from step to step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from h100_llama8b import CONFIG, lognormal, open_8b

from isthmus.engine.messages import AddRequest, pack_tokens
from isthmus.sampling_params import RowSampling

VOCABULARY = 128_000


@dataclass
class Turn:
    """One request's times, in seconds since the turn began."""

    arrived: float
    prompt: list[int]
    output: int
    tokens_at: list[float] = field(default_factory=list)


def arrivals(rate: float, seconds: float, seed: int, way: int = 0) -> list[Turn]:
    """Times and lengths of the seed; each ``way`` has prompts of its own, so that none finds another's cached."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    prompts, outputs = lognormal(rng, len(times), 100, 512), lognormal(rng, len(times), 64, 256)
    rng = np.random.default_rng((seed, way, int(rate)))
    return [
        Turn(float(at), rng.integers(0, VOCABULARY, prompt).tolist(), output)
        for at, prompt, output in zip(times, prompts, outputs, strict=True)
    ]


def serve(core: Any, turns: Sequence[Turn]) -> None:
    began, waiting, left = time.perf_counter(), list(enumerate(turns)), len(turns)
    while left:
        now = time.perf_counter() - began
        while waiting and waiting[0][1].arrived <= now:
            number, turn = waiting.pop(0)
            sampling = RowSampling(max_tokens=turn.output)
            core.add(AddRequest(request_id=number, prompt=pack_tokens(turn.prompt), sampling=sampling))
        if not core.has_work:
            continue
        for item in core.step():
            turn = turns[item.request_id]
            turn.tokens_at += [time.perf_counter() - began] * len(item.tokens)
            left -= len(turn.tokens_at) == turn.output


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": round(1e3 * float(np.percentile(seconds, share)), 2) for share in (50, 90, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("arrivals.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--draw", type=Path, help="measure nothing: plot what is in this file")
    parser.add_argument("--rates", default="5,20,40")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer, to try the script")
    arguments = parser.parse_args()
    result = json.loads(arguments.draw.read_text()) if arguments.draw else measure(arguments)
    if arguments.plot:
        plot(result, arguments.plot)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    llm = open_8b(arguments.device, arguments.layers, max_model_len=4096)
    core: Any = llm._core
    executor = core._executor
    every = executor.graphs
    decode = replace(every, captured=tuple(item for item in every.captured if item.shape.single))
    result: dict[str, Any] = {"device": llm.ready.device_name, "seconds": arguments.seconds, "turns": []}
    serve(core, arrivals(10, 1, 99))  # nothing measured pays for a first time
    for rate in map(float, arguments.rates.split(",")):
        for seed in (1, 2):
            for way, (name, graphs) in enumerate((("all", every), ("decode alone", decode)), 1):
                executor._graphs = graphs
                turns = arrivals(rate, arguments.seconds, seed, way)
                serve(core, turns)
                record = {
                    "graphs": name,
                    "rate": rate,
                    "seed": seed,
                    "requests": len(turns),
                    "first_token_ms": percentiles_ms([turn.tokens_at[0] - turn.arrived for turn in turns]),
                    "between_tokens_ms": percentiles_ms(
                        [gap for turn in turns for gap in np.diff(turn.tokens_at).tolist()]
                    ),
                }
                result["turns"].append(record)
                print(json.dumps(record), flush=True)
                arguments.out.write_text(json.dumps(result, indent=1))
    llm.close()
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """A line from the median to the 99th percentile of each turn, with the 90th marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6))
    rates = sorted({turn["rate"] for turn in result["turns"]})
    for axes, key, title in (
        (panels[0], "first_token_ms", "to the first token"),
        (panels[1], "between_tokens_ms", "between tokens"),
    ):
        for way, name in enumerate(("all", "decode alone")):
            turns = [turn for turn in result["turns"] if turn["graphs"] == name]
            at = [rates.index(turn["rate"]) + 0.25 * way + 0.06 * turn["seed"] for turn in turns]
            low, middle, high = ([turn[key][share] for turn in turns] for share in ("p50", "p90", "p99"))
            axes.vlines(at, low, high, color=f"C{way}", label=("all short steps captured", "decode steps alone")[way])
            axes.plot(at, middle, "o", color=f"C{way}", markersize=4)
        axes.set_yscale("log")
        axes.set_xticks([place + 0.2 for place in range(len(rates))], [f"{rate:g} requests/s" for rate in rates])
        axes.set_ylabel(f"ms {title}")
    panels[0].legend()
    figure.suptitle(f"Llama-3.1-8B's shape on one {result['device']}: p50 to p99 of a turn, p90 marked")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
