"""A Dynamo backend over torch_tpu's compiler that updates mutated arguments in their own buffers.

``torch.compile(backend="tpu")`` of torch_tpu 0.2.0 gives a mutated argument a new buffer: a step that
writes one slot of a cache copies the whole cache, and holds it twice.  Its compiler can donate
arguments; this asks it to donate those that the graph mutates, which autograd's analysis lists.  The
copy back that follows is then an exchange of buffers.  All of this is private to torch_tpu: pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch_tpu._internal.compile._backend import _TPU_DECOMPOSITIONS
from torch_tpu._internal.compile.compiler import StaticCompiler
from torch_tpu._internal.compile.debug import TpuCompileDebug
from torch_tpu._internal.execution_mode import EagerMode, set_eager_mode


def in_place_backend(programs: list[TpuCompileDebug]) -> Callable[..., Any]:
    """The backend; ``programs`` receives one entry, with its StableHLO, for each graph compiled."""

    def compile_forward(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        programs.append(TpuCompileDebug())
        compiler = StaticCompiler(debug=programs[-1])
        return compiler(graph, inputs, donated_inputs=list(metadata.mutated_inp_runtime_indices))

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        with set_eager_mode(EagerMode._INTERNAL_COMPILE_FX_GRAPH):
            return aot_autograd(
                fw_compiler=compile_forward,
                decompositions=_TPU_DECOMPOSITIONS,
                keep_inference_input_mutations=False,
            )(graph, inputs)

    return backend
