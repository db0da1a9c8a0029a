"""Compile for TPUs with libtpu and no TPU, and report what the compiler made: nothing is run.

``python aot_compile.py --topology v6e:2x2`` compiles the attention kernel at several shapes, a decode
step around it whose caches are donated, the same split over four chips, and, with ``--stablehlo
FILE``, the program that torch_tpu made of a step (torch_tpu_step.py).  With ``--programs FOLDER``, it
compiles the programs there instead (engine_steps.py).  The last line is JSON.
Without ``--topology``, every one of them, one process each; ``--out FILE`` writes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e:2x2": "v5litepod-4", "v6e:2x2": "v6e-4", "tpu7x:2x2x1": "tpu7x-8"}

KERNELS: dict[str, dict[str, Any]] = {
    "decode": {},
    "decode, float32": {"dtype": "float32"},
    "decode, SmolLM2": {"heads": 9, "kv_heads": 3, "head_dim": 64},
    "decode, one key head": {"heads": 4, "kv_heads": 1},
    "decode, head_dim 256, window, softcap": {"heads": 16, "head_dim": 256, "window": 4096, "softcap": 50.0},
    "decode, 131072 tokens a row": {"rows": 256, "max_blocks": 4096, "block_size": 32},
    "prefill": {"tokens": 1024, "rows": 8},
    "prefill, float32": {"tokens": 1024, "rows": 8, "dtype": "float32"},
    "prefill, SmolLM2": {"tokens": 1024, "rows": 8, "heads": 9, "kv_heads": 3, "head_dim": 64},
    "prefill, window, softcap": {"tokens": 1024, "rows": 8, "block_size": 32, "window": 512, "softcap": 30.0},
    "prefill, 32 key heads": {"tokens": 512, "rows": 8, "kv_heads": 32},
}
SHAPE = {
    "tokens": 0, "rows": 64, "heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16, "num_blocks": 4096,
    "max_blocks": 128, "window": 0, "softcap": 0.0, "dtype": "bfloat16",
}  # fmt: skip


def environment(topology: str) -> dict[str, str]:
    """What makes libtpu compile for a topology that is not there."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": TOPOLOGIES[topology],
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def devices_of(topology: str) -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@contextlib.contextmanager
def lowering_for(mesh: Any) -> Iterator[None]:
    """Pallas asks the mesh which chip it lowers for."""
    import jax

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def compile_lowered(mesh: Any, function: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The executable, and what the compiler says of it."""
    began = time.perf_counter()
    with lowering_for(mesh):
        lowered = function.lower(*arguments)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    assert "tpu_custom_call" in lowered.as_text(), "the kernel must be in the program"
    memory = compiled.memory_analysis()
    return compiled, {
        "seconds": round(seconds, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def compile_kernel(mesh: Any, change: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from isthmus_tpu.kernels.ragged_paged_attention import cache_width, default_query_tile, ragged_paged_attention

    shape = SHAPE | change
    tokens = shape["tokens"] or shape["rows"]
    heads, kv_heads, dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    tile = default_query_tile(heads, kv_heads, dim) if shape["tokens"] else 1
    here = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])

    def array(dtype: str, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=here)

    half = array(shape["dtype"], shape["num_blocks"] * shape["block_size"], cache_width(kv_heads, dim))
    rows, ints = shape["rows"], functools.partial(array, "int32")
    arguments = (
        array(shape["dtype"], tokens, heads, dim), half, half,
        ints(rows, shape["max_blocks"]), ints(rows + 1), ints(rows), ints(1),
    )  # fmt: skip
    function = functools.partial(
        ragged_paged_attention, kv_heads=kv_heads, block_size=shape["block_size"], scale=dim**-0.5,
        window=shape["window"], softcap=shape["softcap"], query_tile=tile,
    )  # fmt: skip
    _, figures = compile_lowered(mesh, jax.jit(function), *arguments)
    kv_bytes = 2 * half.size * half.dtype.itemsize
    tiles = min(tokens, -(-tokens // tile) + rows)
    lanes = half.shape[1] * max(1, 128 // dim)  # heads narrower than 128 lanes are spread over all of them
    tile_bytes = tiles * tile * (heads // kv_heads) * lanes * half.dtype.itemsize
    return {**figures, "kv_bytes": kv_bytes, "tile_bytes": tile_bytes}


def compile_step(mesh: Any) -> dict[str, Any]:
    """A decode step of two layers on one chip, or on all of the mesh, with donated caches."""
    import jax
    import jax.numpy as jnp
    from decode_step import Model, is_shape, kernel, shapes, sharded, step
    from jax.sharding import NamedSharding

    model = Model(hidden=1024, heads=16, kv_heads=8, inner=2048, vocab=4096, num_blocks=1024, rows=16)
    function = sharded(model, mesh, kernel) if mesh.size > 1 else functools.partial(step, model, None, kernel)

    def array(leaf: Any) -> jax.ShapeDtypeStruct:
        size, dtype, split = leaf
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=NamedSharding(mesh, split))

    weights, caches, inputs = (jax.tree.map(array, tree, is_leaf=is_shape) for tree in shapes(model))
    compiled, figures = compile_lowered(mesh, jax.jit(function, donate_argnums=1), weights, caches, *inputs)
    # Read where collectives can be: this jaxlib does not understand all that libtpu writes on one chip.
    text = compiled.as_text() if mesh.size > 1 else ""
    return {
        **figures,
        "kv_bytes": model.kv_bytes // mesh.size,
        "layers": model.layers,
        "chips": mesh.size,
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "other_collectives": len(re.findall(r" (?:all-gather|all-to-all|collective-permute|reduce-scatter)", text)),
    }


def compile_stablehlo(device: Any, path: Path) -> dict[str, Any]:
    """torch_tpu's own program; through jax internals, since jax's public ways in start from jax functions."""
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client
    from jax.interpreters import mlir

    with mlir.make_ir_context():
        module = mlir.ir.Module.parse(path.read_text())
        options = compiler.get_compile_options(1, 1, device_assignment=np.array([[device.id]]))
        began = time.perf_counter()
        executable = device.client.compile(module, xla_client.DeviceList((device,)), options)
    memory = executable.get_compiled_memory_stats()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def compile_all(topology: str, stablehlo: Path | None) -> dict[str, Any]:
    import jax
    import numpy as np

    devices = devices_of(topology)
    one = jax.sharding.Mesh(np.array(devices[:1]), ("tp",))
    four = jax.sharding.Mesh(np.array(devices[:4]), ("tp",))
    result: dict[str, Any] = {
        "device_kind": devices[0].device_kind,
        "kernels": {name: compile_kernel(one, change) for name, change in KERNELS.items()},
        "step": compile_step(one),
    }
    if topology == "v6e:2x2":
        result["step on four chips"] = compile_step(four)
    if stablehlo is not None:
        result["step by torch_tpu"] = compile_stablehlo(devices[0], stablehlo)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", choices=TOPOLOGIES)
    parser.add_argument("--stablehlo", type=Path)
    parser.add_argument("--programs", type=Path, help="compile the StableHLO files of this folder and nothing else")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.programs:
        device = devices_of(arguments.topology)[0]
        files = sorted(arguments.programs.glob("*.mlir"))
        print(json.dumps([compile_stablehlo(device, path) for path in files]))
        return
    if arguments.topology:
        print(json.dumps(compile_all(arguments.topology, arguments.stablehlo)))
        return

    from importlib.metadata import version

    table: dict[str, Any] = {
        "what": "Compiled ahead of time by libtpu, for chips that were not there; nothing ran on a TPU.",
        "versions": {name: version(name) for name in ("libtpu", "jax", "torch", "torch_tpu")},
    }
    for topology in TOPOLOGIES:
        command = [sys.executable, __file__, "--topology", topology]
        if arguments.stablehlo:
            command += ["--stablehlo", str(arguments.stablehlo)]
        done = subprocess.run(command, env=environment(topology), stdout=subprocess.PIPE, text=True, check=True)
        table[topology] = json.loads(done.stdout.splitlines()[-1])
    text = json.dumps(table, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
