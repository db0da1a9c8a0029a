"""Which kernels a start compiles ahead, and which the steps after it still ask for, on a device that is not there.

The parts of the CUDA backend run over tensors that hold nothing.  Nothing is compiled: each variant
that Triton would compile is recorded by its own key.  Prints two lists of names as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from isthmus.contract import AttentionSpec, DeviceState, Limits, RotarySpec, StepInputs, StepShape
from isthmus.executor.dummy import dummy_plan
from isthmus_triton.ahead import CompileAhead
from isthmus_triton.attention import TritonAttention, _no_inputs
from isthmus_triton.inputs import TritonInputs, history_width
from isthmus_triton.launch import launch_table
from isthmus_triton.ops import TritonOps
from isthmus_triton.sampling import TritonSampling

META = torch.device("meta")


class NoDevice:
    """A Triton driver that knows its target and nothing else."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Never:
    """Stands for a compiled kernel, and does nothing when launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: None


def record() -> list[tuple[str, str]]:
    """(kernel, key) of every compilation asked for from now on, none of which is made."""
    asked: list[tuple[str, str]] = []
    run = JITFunction.run

    def note(function: Any, key: str, *rest: Any) -> Never:
        asked.append((function.__name__, key))
        return Never()

    def only_look(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(function, *arguments, grid=grid, warmup=True, **options)

    JITFunction._do_compile = note
    JITFunction.run = only_look
    return asked


class Immediate(CompileAhead):
    """Asks for each launch at once, on the calling thread."""

    def begin(self, launches: Any) -> None:
        for launch in launches:
            launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)


def start(limits: Limits, layer: AttentionSpec, hidden: int, dtype: torch.dtype, arch: str) -> Any:
    """The parts as a start makes them, and what they allocate."""
    table, ahead = launch_table(arch), Immediate(META)
    ops = TritonOps(META, table, ahead=ahead)
    embedding = ops.prepare_table(torch.empty(limits.vocab_size, hidden, dtype=dtype, device=META))
    inner = 14336 if hidden == 4096 else 4 * hidden
    weights = [
        ops.prepare_linear(torch.empty(out, into, dtype=dtype, device=META))
        for out, into in (
            ((layer.heads + 2 * layer.kv_heads) * layer.head_dim, hidden),
            (hidden, layer.heads * layer.head_dim),
            (2 * inner, hidden),
            (hidden, inner),
            (limits.vocab_size, hidden),
        )
    ]
    attention = TritonAttention(META, table, 132, ahead=ahead)
    [cache] = attention.allocate([layer], limits, str(dtype).removeprefix("torch."))
    sampling = TritonSampling(META, table, ahead)
    return ops, embedding, weights, attention, cache, sampling, sampling.allocate(limits)


def step(parts: Any, inputs: StepInputs, layer: AttentionSpec, limits: Limits) -> None:
    """One layer and what is around it."""
    ops, embedding, (qkv, output, gate_up, down, head), attention, cache, sampling, state = parts
    norm = torch.empty(embedding.shape[1], device=META)
    rotary = RotarySpec(
        cos_sin=torch.empty(limits.max_model_len, layer.head_dim, device=META), rotary_dim=layer.head_dim
    )
    residual = ops.embed(inputs.token_ids, embedding, 1.0)
    plan = attention.plan(inputs)
    normed = ops.rms_norm(residual, norm, 1e-5)
    query = attention.rotate_and_store(ops.linear(normed, qkv), cache, layer, rotary, None, inputs)
    attended = ops.linear(attention.attend(query, cache, layer, plan, inputs), output)
    normed, residual = ops.add_rms_norm(attended, residual, norm, 1e-5)
    gated = ops.gated_activation(ops.linear(normed, gate_up), "silu")
    normed, _ = ops.add_rms_norm(ops.linear(gated.contiguous(), down), residual, norm, 1e-5)
    logits = ops.logits(ops.take_rows(normed, inputs.sample_tokens), head, 0.0)
    device = DeviceState(
        tokens=torch.empty(limits.max_rows + 1, history_width(limits), dtype=torch.int32, device=META),
        block_tables=inputs.block_tables,
        num_prompt_tokens=torch.empty(limits.max_rows + 1, dtype=torch.int32, device=META),
    )
    sampling.sample(logits, inputs, device, state, -1)


def main() -> None:
    arch = sys.argv[1]
    driver.set_active(NoDevice(int(arch.removeprefix("sm_"))))
    limits = Limits(
        max_rows=768, max_tokens=8192, max_model_len=17408, block_size=16, num_blocks=64, vocab_size=128_256
    )
    layer = AttentionSpec(heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)
    asked = record()
    parts = start(limits, layer, 4096, torch.bfloat16, arch)
    # Inputs on the host: what is launched is the same, and a host's plan can be uploaded there.
    host = Immediate(torch.device("cpu"))
    type(host).active = property(lambda self: True)
    inputs = TritonInputs(torch.device("cpu"), host)
    state = inputs.allocate(limits)
    ahead, asked[:] = list(asked), []
    for spans, length in ((1, 1), (1, 16), (8, 1), (2, 16), (64, 1), (600, 1), (512, 16)):
        inputs.upload(dummy_plan([length] * spans), state)
        inputs.build(state, StepShape(spans * length, spans, spans))
        step(parts, _no_inputs(spans, length, limits, META), layer, limits)
    late = sorted({name for name, key in asked if (name, key) not in ahead})
    print(json.dumps({"ahead": sorted(name for name, _ in set(ahead)), "late": late}))


if __name__ == "__main__":
    main()
