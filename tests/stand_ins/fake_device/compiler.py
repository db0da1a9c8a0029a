"""The device's Dynamo backend: static shapes, whole graphs, everything on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd

from fake_device.native import Native

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Sizes, strides and dtype of one input: what a graph is compiled for."""


class CompiledGraph:
    """One compiled graph, called with the graph's inputs in order.

    It runs node by node on the device, so an input that the graph mutates is mutated in place.  It has no guards of
    its own: inputs of another layout than it was compiled for are refused, as a device would misread them.
    """

    def __init__(
        self, module: Callable[..., Any], inputs: tuple[Layout | None, ...], num_nodes: int, owner: Compiler
    ) -> None:
        self.inputs = inputs
        self.num_nodes = num_nodes
        self.runs = 0
        self._module = module
        self._owner = owner

    def __call__(self, *args: Any) -> Any:
        given = tuple(_layout(arg) for arg in args)
        if given != self.inputs:
            raise RuntimeError(
                f"{self._owner.device}: a graph compiled for {self.inputs} was called with {given}; compile another"
            )
        return self._owner.run(self, self._module, args)


class Compiler:
    """Compiles FX graphs for the device; called by ``torch.compile(..., backend=name)``.

    It refuses symbolic shapes, graph breaks, CPU inputs, and operators whose output has a data-dependent shape.  With
    ``functionalize`` it takes the graph through AOTAutograd, as vendors' compilers do: mutations then become a copy at
    the graph's end, which costs memory that a vendor's aliasing saves.
    """

    def __init__(self, device: str, native: Native) -> None:
        self.device = device
        self.functionalize = False
        self.graphs: list[CompiledGraph] = []
        self.runs = 0
        self._native = native

    @property
    def __name__(self) -> str:
        return f"{self.device}_fake_compiler"

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """``options`` are torch.compile's, of which a dynamic one is refused."""
        if (options.get("options") or {}).get("dynamic"):
            raise RuntimeError(f"{self.device}: dynamic shapes are not supported; compile with dynamic=False")
        self._check_inputs(inputs)
        self._check_whole(module)
        self._check_nodes(module)
        if self.functionalize:
            return aot_autograd(fw_compiler=self._lower, keep_inference_input_mutations=True)(module, list(inputs))
        return self._lower(module, inputs)

    def reset(self) -> None:
        self.graphs.clear()
        self.runs = 0

    def run(self, graph: CompiledGraph, module: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        graph.runs += 1
        self.runs += 1
        self._native.enter_graph()
        try:
            return module(*args)
        finally:
            self._native.leave_graph()

    def _lower(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
        graph = CompiledGraph(module.forward, tuple(_layout(x) for x in inputs), len(module.graph.nodes), self)
        self.graphs.append(graph)
        return graph

    def _check_inputs(self, inputs: Sequence[Any]) -> None:
        for position, value in enumerate(inputs):
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or (
                isinstance(value, torch.Tensor) and not _is_static(value)
            ):
                raise RuntimeError(
                    f"{self.device}: input {position} has a symbolic shape; this device compiles static shapes, "
                    "one graph each: compile with dynamic=False"
                )
            if isinstance(value, torch.Tensor) and value.device.type != self.device:
                raise RuntimeError(
                    f"{self.device}: input {position} of the graph is on {value.device}; move it to the device first"
                )

    def _check_whole(self, module: torch.fx.GraphModule) -> None:
        reason = getattr(module, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            raise RuntimeError(
                f"{self.device}: a graph break ({reason.reason}); this device takes whole graphs: "
                "compile with fullgraph=True to see where it breaks"
            )

    def _check_nodes(self, module: torch.fx.GraphModule) -> None:
        for node in module.graph.nodes:
            value = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                raise RuntimeError(f"{self.device}: {node.name} is read by the host inside the graph")
            if not isinstance(value, torch.Tensor):
                continue
            if not _is_static(value):
                raise RuntimeError(f"{self.device}: {node.name} has a data-dependent shape, {tuple(value.shape)}")
            if value.device.type != self.device and value.dim() > 0:
                raise RuntimeError(
                    f"{self.device}: {node.name} is on {value.device} inside the graph; nothing but the graph's inputs "
                    "and results crosses between host and device: name the device where the tensor is made"
                )


def _is_static(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in (*tensor.shape, *tensor.stride()))


def _layout(value: Any) -> Layout | None:
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(value.shape), tuple(value.stride()), value.dtype
