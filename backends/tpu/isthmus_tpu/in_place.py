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
    if NAME in torch._dynamo.list_backends():
        return NAME
    compiler = _compiler()
    if compiler is None:
        return STOCK
    torch._dynamo.register_backend(compiler, name=NAME)
    return NAME


def _compiler() -> Callable[..., Any] | None:
    try:
        from torch_tpu._internal.compile._backend import _TPU_DECOMPOSITIONS
        from torch_tpu._internal.compile.compiler import StaticCompiler
        from torch_tpu._internal.execution_mode import EagerMode, set_eager_mode

        tracing = EagerMode._INTERNAL_COMPILE_FX_GRAPH
    except (ImportError, AttributeError):
        return None

    def compile_forward(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        return StaticCompiler()(graph, inputs, donated_inputs=list(metadata.mutated_inp_runtime_indices))

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        with set_eager_mode(tracing):
            return aot_autograd(
                fw_compiler=compile_forward,
                decompositions=_TPU_DECOMPOSITIONS,
                keep_inference_input_mutations=False,
            )(graph, inputs)

    return compile_graph
