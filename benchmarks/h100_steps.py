"""Whole steps of the 8B shape on the card at hand: decode steps over launch tables, and steps that hold prompts.

    python benchmarks/h100_steps.py --out h100_steps.json [--rows 8,32,128] [--context 256]

A decode step is captured for exactly its rows, all at one context over random keys, and replayed back
to back; microseconds, the median of five times twelve.  A step that holds prompts is run eagerly, and
replayed where the engine has a graph for it: milliseconds of the device, and of the host until it has
queued the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from h100_llama8b import open_8b

from isthmus.contract import StepShape
from isthmus.executor.capture import Capture
from isthmus.plan import RowStart, StepPlan
from isthmus.sampling_params import RowSampling
from isthmus_triton.launch import LaunchTable, SplitLinear, VectorLinear

NUM_BLOCKS = 14_000
MIXED: dict[str, list[tuple[int, int]]] = {
    **{f"{rows} x {length}": [(length, length)] * rows for rows, length in ((1, 16), (1, 64), (1, 100), (1, 200))},
    **{f"{rows} x {length}": [(length, length)] * rows for rows, length in ((1, 512), (8, 64), (1, 2048), (2, 4096))},
    "32 decode, 1 x 32": [(256, 1)] * 32 + [(32, 32)],
    "64 decode, 1 x 128": [(256, 1)] * 64 + [(128, 128)],
    "100 decode, 2 x 200": [(256, 1)] * 100 + [(200, 200)] * 2,
}
"""Context and new tokens of each span."""


class Steps:
    """An engine's executor, its steps planned by hand."""

    def __init__(self, llm: Any) -> None:
        executor = llm._core._executor
        self.executor, self.backend, self.limits = executor, executor._backend, executor.limits
        self.ops = self.backend.ops
        self.capture = Capture(
            backend=self.backend,
            model=executor._model,
            limits=self.limits,
            padding=executor._padding,
            device=executor._device,
            sampling_state=executor._sampling_state,
            caches=executor._caches,
        )
        for cache in executor._caches:
            cache.keys.normal_()
            cache.values.normal_()

    def plan(self, spans: list[tuple[int, int]]) -> StepPlan:
        """Each row computes the last of its context's tokens, and samples."""
        rng, row = np.random.default_rng(0), np.arange(len(spans), dtype=np.int32)
        contexts, lengths = np.array(spans, np.int32).T
        blocks = -(-contexts // self.limits.block_size)
        ids = rng.permutation(np.arange(1, self.limits.num_blocks, dtype=np.int32))[: blocks.sum()]
        sampling = RowSampling(max_tokens=9)
        return StepPlan(
            step=0,
            starts=tuple(
                RowStart(
                    row=int(place),
                    tokens=rng.integers(0, 128000, context).astype(np.int32),
                    num_prompt_tokens=context,
                    sampling=sampling,
                )
                for place, context in zip(row, contexts, strict=True)
            ),
            block_rows=np.repeat(row, blocks),
            block_indices=np.concatenate([np.arange(count, dtype=np.int32) for count in blocks]),
            block_ids=ids,
            span_rows=row,
            span_starts=contexts - lengths,
            span_lengths=lengths,
            span_samples=np.ones(len(spans), np.bool_),
        )

    def upload(self, plan: StepPlan) -> None:
        self.backend.inputs.upload(plan, self.executor._device)
        self.backend.sampling.apply(self.executor._sampling_state, plan)

    def decode_us(self, rows: int, context: int, table: LaunchTable) -> float:
        usual, self.ops._table = self.ops._table, table
        plan, shape = self.plan([(context, 1)] * rows), StepShape(rows, rows, rows, single=True)
        try:
            self.upload(plan)
            # Once eagerly: nothing may be compiled in mid-capture.
            inputs, logits = self.capture._logits(shape)
            self.backend.sampling.sample(logits, inputs, self.executor._device, self.executor._sampling_state, -1)
            torch.cuda.synchronize()
            self.upload(plan)
            graph = self.capture._step(shape)
        finally:
            self.ops._table = usual
        times = []
        for _ in range(5):
            with DeviceTime() as spent:
                for _ in range(12):
                    graph.replay(rows)
            times.append(spent.ms * 1e3 / 12)
        return round(statistics.median(times), 1)

    def mixed_ms(self, spans: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Of the device and of the host until it has queued the step, seven times: eagerly, then replayed."""
        plan = self.plan(spans)
        shape = self.executor._padding.shape(plan)
        graph = self.executor.graphs.find(shape, all_sampled=True)

        def eager() -> None:
            inputs, _, logits = self.executor._forward(shape, None, keep_hidden=False)
            self.backend.sampling.sample(logits, inputs, self.executor._device, self.executor._sampling_state, -1)

        def replayed() -> None:
            assert graph is not None
            graph.graph.replay(plan.num_tokens)

        for how, captured, step in [("eager", 0, eager)] + (
            [("replayed", graph.shape.tokens, replayed)] if graph else []
        ):
            device, host = [], []
            for _ in range(7):
                self.upload(plan)
                with DeviceTime() as spent:
                    began = time.perf_counter()
                    step()
                    host.append(round((time.perf_counter() - began) * 1e3, 2))
                device.append(round(spent.ms, 2))
            yield {"how": how, "captured_tokens": captured, "device_ms": device, "host_ms": host}


class DeviceTime:
    """Milliseconds between the block's first and last work on the device."""

    ms = 0.0

    def __enter__(self) -> DeviceTime:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.record()
        self._end.synchronize()
        self.ms = self._begin.elapsed_time(self._end)


@dataclass(frozen=True)
class Variant:
    name: str
    table: LaunchTable


ONE_ROW = ((4, 2048, 4), (4, 2048, 8), (4, 1024, 4), (2, 2048, 4), (8, 2048, 8))
"""Rows and columns of the weight that a program takes at once, and its warps."""


def variants(table: LaunchTable, rows: int) -> Iterator[Variant]:
    yield Variant("as committed", table)
    yield Variant("as committed, again", table)
    if rows == 1:
        for out_tile, in_tile, warps in ONE_ROW:
            launch = VectorLinear(out_tile=out_tile, in_tile=in_tile, warps=warps)
            rules = (replace(table.linear[0], launch=launch), *table.linear[1:])
            yield Variant(f"{out_tile} x {in_tile} on {warps} warps", replace(table, linear=rules))
        return
    yield Variant("the library from 2 rows on", replace(table, linear=table.linear[:1]))
    for columns in (0, 256, 512):
        rules = tuple(
            replace(rule, launch=replace(rule.launch, ahead=columns)) if isinstance(rule.launch, SplitLinear) else rule
            for rule in table.linear
        )
        yield Variant(f"asking for {columns} columns ahead", replace(table, linear=rules))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("h100_steps.json"))
    parser.add_argument("--rows", default="1,8,32,64,128,256,512")
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    llm = open_8b(max_model_len=4096, num_blocks=NUM_BLOCKS)
    result: dict[str, Any] = {
        "device": llm.ready.device_name,
        "context": arguments.context,
        "decode": [],
        "mixed": [],
    }
    with torch.inference_mode():
        steps = Steps(llm)
        for rows in map(int, arguments.rows.split(",")):
            for variant in variants(steps.ops._table, rows):
                us = steps.decode_us(rows, arguments.context, variant.table)
                result["decode"].append({"rows": rows, "variant": variant.name, "us": us})
                print(f"{rows:4d} rows  {variant.name:32s} {us:9.1f} us", flush=True)
        for name, spans in MIXED.items():
            for found in steps.mixed_ms(spans):
                result["mixed"].append({"step": name, **found})
                medians = [statistics.median(found[key]) for key in ("device_ms", "host_ms")]
                print(
                    f"{name:20s} {found['how']:8s} device {medians[0]:6.2f} ms, host {medians[1]:6.2f} ms", flush=True
                )
    arguments.out.write_text(json.dumps(result, indent=1))
    llm.close()


if __name__ == "__main__":
    main()
