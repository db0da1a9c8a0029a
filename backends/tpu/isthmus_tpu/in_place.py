"""A Dynamo compiler over torch_tpu's that updates what a step writes in its own buffers.

``torch.compile(backend="tpu")`` of torch_tpu 0.2 gives a mutated argument a new buffer: a step that writes
one slot of a cache copies the whole cache, and holds it twice.  Its static compiler can donate arguments;
this asks it to donate those that the graph mutates, which autograd's analysis lists.  The copy back that
follows is then an exchange of buffers.  All of this is private to torch_tpu, so that :func:`register` may
find it gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

NAME: Final = "tpu_in_place"
STOCK: Final = "tpu"


def register() -> str:
    """The name of the Dynamo compiler to use: :data:`NAME`, or :data:`STOCK` where torch_tpu has not what it needs."""
    if NAME not in torch._dynamo.list_backends():
        try:
            torch._dynamo.register_backend(compiler(), name=NAME)
        except (ImportError, AttributeError):
            return STOCK
    return NAME


def compiler(programs: list[Any] | None = None) -> Callable[..., Any]:
    """The compiler; ``programs`` receives torch_tpu's notes of each graph, its StableHLO among them.

    Raises :class:`ImportError` or :class:`AttributeError` where torch_tpu is another than it was written for.
    """
    from torch_tpu._internal.compile._backend import _TPU_DECOMPOSITIONS
    from torch_tpu._internal.compile.compiler import StaticCompiler
    from torch_tpu._internal.compile.debug import TpuCompileDebug
    from torch_tpu._internal.execution_mode import EagerMode, set_eager_mode

    tracing = EagerMode._INTERNAL_COMPILE_FX_GRAPH

    def compile_forward(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        notes = None if programs is None else TpuCompileDebug()
        if programs is not None:
            programs.append(notes)
        return StaticCompiler(debug=notes)(graph, inputs, donated_inputs=list(metadata.mutated_inp_runtime_indices))

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        with set_eager_mode(tracing):
            return aot_autograd(
                fw_compiler=compile_forward,
                decompositions=_TPU_DECOMPOSITIONS,
                keep_inference_input_mutations=False,
            )(graph, inputs)

    return compile_graph
