"""Stand-in for `habana_frameworks.torch.hpu.graphs`: one recording for each signature of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fake_device import installed
from torch.utils._pytree import tree_flatten


class WrappedForward:
    """A module's forward, under the rules of a graph.

    `graphs` counts the calls of each signature: the shapes, dtypes and devices of the tensors and the values of the
    rest.  The real one captures at a signature's first call and replays at later ones; this one runs each time.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.graphs: dict[Any, int] = {}
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, shape = tree_flatten((args, kwargs))
        signature = (str(shape), tuple(_signature(leaf) for leaf in leaves))
        self.graphs[signature] = self.graphs.get(signature, 0) + 1
        with installed().in_graph():
            return self._forward(*args, **kwargs)


def wrap_in_hpu_graph(
    module: torch.nn.Module | Callable[..., Any],
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> Any:
    """The module itself, its `forward` now a :class:`WrappedForward`; a function is returned as one."""
    if not isinstance(module, torch.nn.Module):
        return WrappedForward(module)
    module.forward = WrappedForward(module.forward)
    return module


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf
