"""Whole engines on torch_tpu's own device, whose client is XLA's CPU one; prints figures as JSON.

Run with REAL_PJRT and TPU_LIBRARY_PATH as conftest.py sets them.  ``--stablehlo FOLDER`` writes the programs
of a larger engine in bfloat16, one file for each shape of a step, for the TPU compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_tpu._loader

from isthmus.reference import ReferenceBackend
from isthmus.sampling_params import RowSampling
from isthmus.testing.device import DeviceUnderTest
from isthmus.testing.suite.engines import GREEDY, Arrangement, Engine
from isthmus.testing.tiny_model import write_tiny_model
from isthmus.testing.toy_model import VOCAB_SIZE
from isthmus_tpu import in_place

FEW = {"token_buckets": "64", "span_buckets": "1,4", "block_buckets": "4"}
TIGHT = Arrangement(rows=4, tokens=64, cache_tokens=256, prefix_caching=True)
ALONE = Arrangement(rows=1, overlap=False, graphs=False)
LENGTHS = (1, 2, 17, 50, 100, 33, 16, 70, 128, 100)
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "intermediate_size": 2048, "num_hidden_layers": 2}  # fmt: skip


def drawn(index: int) -> RowSampling:
    return RowSampling(max_tokens=12, temperature=0.9, top_k=(0, 20)[index % 2], top_p=0.95, seed=index + 1)


def penalised(index: int) -> RowSampling:
    return RowSampling(max_tokens=8, temperature=0.7, seed=index, presence_penalty=0.5, num_logprobs=2)


def make_prompts() -> list[list[int]]:
    """The last one begins as the fifth does."""
    rng = np.random.default_rng(17)
    made = [rng.integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS]
    return [*made[:-1], [*made[4][:96], *made[-1][96:]]]


def compilations() -> int:
    """Of programs and of operations by themselves; those found on the disk do not count."""
    return int(torch.tpu._get_cache_stats().num_compilations)


def misses() -> int:
    """As :func:`compilations`, with those found on the disk."""
    return int(torch.tpu._get_cache_misses())


def whole_engine(device: DeviceUnderTest) -> dict[str, Any]:
    model, prompts = str(write_tiny_model(Path(tempfile.mkdtemp()))), make_prompts()
    began = time.perf_counter()
    engine = Engine(device.parts, model, TIGHT)
    started = time.perf_counter() - began
    reference = Engine(ReferenceBackend(), model, ALONE)
    compiled_at_start, before = compilations(), misses()
    equal = {
        "greedy": engine.run(prompts).tokens == reference.run(prompts).tokens,
        "drawn": engine.run(prompts, drawn).tokens == reference.run(prompts, drawn).tokens,
    }
    long = RowSampling(max_tokens=60)
    four = [[50 + index, *range(7, 31)] for index in range(4)]
    equal["preempted"] = engine.run(four, long).tokens == reference.run(four, long).tokens
    found, wanted = engine.run(prompts, abort=lambda index: index % 3 == 1), reference.run(prompts)
    equal["beside aborted ones"] = all(found.tokens[i] == wanted.tokens[i] for i in wanted.tokens if i % 3 != 1)
    missed = misses() - before
    equal["by the host's sampling"] = (
        engine.run(prompts[:4], penalised).tokens == reference.run(prompts[:4], penalised).tokens
    )
    stats = engine.stats
    figures = {
        "equal": equal,
        "graphs": len(engine.executor.graphs.captured),
        "shapes": len(engine.executor._padding.shapes()),
        "start_s": round(started, 1),
        "compiled_at_start": compiled_at_start,
        "missed_while_serving": missed,
        "late_compiles": stats.late_compiles,
        "preemptions": stats.preemptions,
        "prefix_hits": stats.prefix_hits,
    }
    engine.close()
    return figures


def programs_of_a_larger_engine(folder: Path, programs: list[Any]) -> dict[str, Any]:
    """Opened anew, with fewer shapes: what it compiles for its steps goes to ``folder``."""
    device = DeviceUnderTest.open("tpu", {"token_buckets": "256", "span_buckets": "16", "block_buckets": "6"})
    model = str(write_tiny_model(Path(tempfile.mkdtemp()), "llama", **LARGE))
    programs.clear()
    engine = Engine(device.parts, model, Arrangement(rows=16, tokens=256, cache_tokens=65536, dtype="bfloat16"))
    kv_bytes = sum(store.nbytes for cache in engine.executor._caches for store in (cache.keys, cache.values))
    table_bytes = engine.executor._device.block_tables.nbytes
    tokens = [len(item) for item in engine.run([[5, 6, 7], [8] * 100]).tokens.values()]
    texts = [program.stablehlo_forward_text[0] for program in programs]
    # A step writes two layers' keys and values and the block tables; a row's start and sampling write less.
    steps = [text for text in texts if len(re.findall(r"jax.buffer_donor|tf.aliasing", text)) == 5]
    for index, text in enumerate(steps):
        (folder / f"{index}.mlir").write_text(text)
    engine.close()
    device.close()
    return {"steps": len(steps), "kv_bytes": kv_bytes, "table_bytes": table_bytes, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stablehlo", type=Path)
    folder = parser.parse_args().stablehlo
    # Private, and the reason that requirements.txt pins torch_tpu: a public load looks for a TPU on the PCI bus.
    torch_tpu._loader._init_device("tpu")
    programs: list[Any] = []
    if folder is not None:
        torch._dynamo.register_backend(in_place.compiler(programs), name=in_place.NAME)
    device = DeviceUnderTest.open("tpu", FEW)
    figures = {
        "device": device.parts.device.name,
        "providers": device.parts.providers(),
        "greedy_tokens": GREEDY.max_tokens,
        "engine": whole_engine(device),
    }
    device.close()
    if folder is not None:
        figures["larger"] = programs_of_a_larger_engine(folder, programs)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
