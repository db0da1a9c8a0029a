"""A small model over HTTP on the CPU: throughput, latency, memory and start-up, beside any peers.

    python benchmarks/cpu_http.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --json result.json
    python benchmarks/cpu_http.py ... --peer 'llama.cpp=llama-server -m model.gguf --port {port} -np 32'

Each server is started, warmed and driven by the same client (``isthmus bench serve``) with the same
seeded requests; the servers take turns, run by run, so that ratios hold when the machine's speed
drifts.  Memory bandwidth is measured before every run and stands beside its figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from tqdm import tqdm

READY_TIMEOUT_S = 300.0
PORT = 8311


def main() -> int:
    args = parse_arguments()
    isthmus = str(Path(sys.executable).parent / "isthmus")
    servers = {"isthmus": f"{isthmus} serve {args.model} --port {{port}} {args.serve_arguments}"}
    servers |= dict(peer.split("=", 1) for peer in args.peer)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    turns = [(name, turn) for turn in range(args.runs) for name in servers]
    for name, turn in tqdm(turns, unit="run", disable=not sys.stderr.isatty()):
        rounds[name].append(measure(servers[name], isthmus, args, seed=args.seed + turn))
        print(f"{name} run {turn + 1}: {one_line(rounds[name][-1])}", file=sys.stderr, flush=True)
    result = {
        "machine": machine(),
        "workload": {
            "requests": args.num_requests,
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "concurrency": args.concurrency,
            "seed": args.seed,
        },
        "servers": {name: {"command": servers[name], "runs": runs} for name, runs in rounds.items()},
        "median": {name: medians(runs) for name, runs in rounds.items()},
        "ratio_to_best_peer": ratios(rounds),
    }
    text = json.dumps(result, indent=1)
    print(json.dumps({"median": result["median"], "ratio_to_best_peer": result["ratio_to_best_peer"]}, indent=1))
    if args.json:
        Path(args.json).write_text(text + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--serve-arguments", default="", help="more arguments for `isthmus serve`")
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND with {port} in it")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    return parser.parse_args()


def measure(command: str, isthmus: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    bandwidth = copy_bandwidth()
    with serving(command) as (process, ready_s), peak_memory(process) as peak, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        bench = [isthmus, "bench", "serve", "--url", f"http://127.0.0.1:{PORT}"]
        bench += ["--concurrency", args.concurrency, "--num-requests", str(args.num_requests)]
        bench += ["--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(args.output_tokens)]
        bench += ["--vocab-size", str(args.vocab_size), "--seed", str(seed), "--output-json", str(output)]
        subprocess.run(bench, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        figures = json.loads(output.read_text())
    return {
        "copy_bandwidth_gb_s": round(bandwidth, 1),
        "ready_s": round(ready_s, 2),
        "peak_resident_mb": round(peak[0] / 2**20),
        "bench": figures,
    }


@contextmanager
def serving(command: str) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(shlex.split(command.format(port=PORT)), stdout=log, stderr=log)
        try:
            while not answers(process, log):
                if time.monotonic() - started > READY_TIMEOUT_S:
                    raise SystemExit(f"not ready after {READY_TIMEOUT_S:.0f} s: {command}")
                time.sleep(0.05)
            yield process, time.monotonic() - started
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(process: subprocess.Popen[bytes], log: Any) -> bool:
    if process.poll() is not None:
        log.seek(0)
        raise SystemExit(f"the server ended with {process.returncode}:\n{log.read().decode()[-2000:]}")
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=2).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextmanager
def peak_memory(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Largest sum of resident memory over the server's processes, sampled ten times a second."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            try:
                root = psutil.Process(process.pid)
                family = [root, *root.children(recursive=True)]
                peak[0] = max(peak[0], sum(member.memory_info().rss for member in family))
            except psutil.NoSuchProcess:
                continue

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def copy_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """GB/s read and written by as many threads as there are cores, each copying its own array."""
    cores = len(psutil.Process().cpu_affinity() or [0])
    arrays = [(np.ones(megabytes * 2**17), np.ones(megabytes * 2**17)) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(repeats):
            started = time.perf_counter()
            list(threads.map(lambda pair: np.copyto(pair[0], pair[1]), arrays))
            best = max(best, 2 * cores * megabytes * 2**20 / (time.perf_counter() - started))
    return best / 1e9


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("fma", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family": fields.get("cpu family", ""),
        "features": [flag for flag in wanted if flag in fields.get("flags", "").split()],
        "cores": len(psutil.Process().cpu_affinity() or [0]),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def figures_of(run: dict[str, Any]) -> dict[str, float]:
    """The figures of one run under flat names, such as ``output_tok_s@8``."""
    flat: dict[str, float] = {"ready_s": run["ready_s"], "peak_resident_mb": run["peak_resident_mb"]}
    for result in run["bench"]["runs"]:
        at = result["concurrency"]
        flat[f"output_tok_s@{at}"] = result["output_token_per_s"]
        for name in ("ttft_ms", "itl_ms"):
            for percentile in ("p50", "p90", "p99"):
                flat[f"{name}_{percentile}@{at}"] = result[name][percentile]
    return flat


def medians(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    flat = [figures_of(run) for run in runs]
    return {
        name: {
            "median": round(statistics.median(figures[name] for figures in flat), 2),
            "least": round(min(figures[name] for figures in flat), 2),
            "most": round(max(figures[name] for figures in flat), 2),
        }
        for name in flat[0]
    }


def ratios(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Output rate over the best peer's, run by run."""
    peers = [name for name in rounds if name != "isthmus"]
    if not peers:
        return {}
    by_name: dict[str, list[float]] = {}
    for turn, ours in enumerate(rounds["isthmus"]):
        theirs = [figures_of(rounds[peer][turn]) for peer in peers]
        for name, value in figures_of(ours).items():
            if name.startswith("output_tok_s"):
                by_name.setdefault(name, []).append(value / max(figures[name] for figures in theirs))
    return {
        name: {
            "median": round(statistics.median(values), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
        }
        for name, values in by_name.items()
    }


def one_line(run: dict[str, Any]) -> str:
    flat = figures_of(run)
    rates = ", ".join(f"{name.partition('@')[2]}: {flat[name]:.0f}" for name in flat if name.startswith("output"))
    return (
        f"out tok/s {rates}; ready {run['ready_s']} s; {run['peak_resident_mb']} MB; {run['copy_bandwidth_gb_s']} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
