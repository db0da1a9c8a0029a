"""Compiled programs: whole steps as graphs, and small functions of tensors; counted, and run without a guard.

torch.compile checks on each call that what it saw while tracing is still so.  Here nothing of a
program but its tensors' contents ever changes, so that what the compiler returned is kept with the
tensors that it was first called on, and called on them again.
"""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isthmus.contract import CapturedGraph
from isthmus.errors import Unsupported

log = logging.getLogger(__name__)
T = TypeVar("T")


class Feed(Protocol):
    """Tensors that are new in every step."""

    ints: Tensor
    floats: Tensor

    def flush(self) -> None: ...


class Compiled(Generic[T]):
    """What the compiler made of a function of no arguments, with the tensors that the function closes over."""

    def __init__(self, run: Callable[..., Any], arguments: Sequence[Any], outputs: Sequence[Any], result: T) -> None:
        self._run = run
        self._arguments = list(arguments)
        leaves, self._structure = pytree.tree_flatten(result)
        self._sources = [_index_of(leaf, outputs) for leaf in leaves]

    def places_of(self, tensor: Tensor) -> list[int]:
        """Which arguments are this tensor."""
        return [place for place, argument in enumerate(self._arguments) if argument is tensor]

    def forget(self, places: Sequence[int]) -> None:
        """Do not keep these arguments alive: every call brings its own."""
        for place in places:
            self._arguments[place] = None

    def __call__(self, replaced: Sequence[tuple[int, Tensor]]) -> T:
        arguments = self._arguments.copy()
        for place, tensor in replaced:
            arguments[place] = tensor
        outputs = self._run(*arguments)
        result: T = pytree.tree_unflatten([outputs[source] for source in self._sources], self._structure)
        return result


def _index_of(leaf: Any, outputs: Sequence[Any]) -> int:
    for index, output in enumerate(outputs):
        if output is leaf:
            return index
    raise Unsupported("a compiled step returns something that the compiler did not compute; it cannot be replayed")


class Replay(Generic[T]):
    """:class:`isthmus.contract.CapturedGraph` whose step buffer is the current one."""

    def __init__(self, compiled: Compiled[T], feed: Feed) -> None:
        self._compiled = compiled
        self._feed = feed
        self._ints = compiled.places_of(feed.ints)
        self._floats = compiled.places_of(feed.floats)

    def replay(self, num_tokens: int) -> T:
        feed = self._feed
        feed.flush()
        replaced = [(place, feed.ints) for place in self._ints] + [(place, feed.floats) for place in self._floats]
        return self._compiled(replaced)


class Programs:
    """:class:`isthmus.contract.Graphs` of a Dynamo compiler, and its small programs by name and shapes.

    After :meth:`ready` a compile is a fault of the buckets: it is logged and counted in
    :attr:`late_compiles`.
    """

    def __init__(self, compiler: str) -> None:
        self._compiler = compiler
        self._named: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._feed: Feed | None = None
        self._is_ready = False
        self.compiles = 0
        self.compile_s = 0.0
        self.late_compiles = 0

    def feed(self, feed: Feed) -> None:
        """Graphs captured from now on read these tensors."""
        self._feed = feed
        self._is_ready = False
        self._named.clear()

    def keeps(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Programs may write these whole tensors in place, and no longer those that ``name`` stood for before.

        Dynamo sees by itself what a program writes; a compiler that does not overrides this.
        """

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def ready(self) -> None:
        """Every shape has been compiled."""
        self._is_ready = True

    def capture(self, step: Callable[[], T], num_tokens: int) -> CapturedGraph[T]:
        assert self._feed is not None, "inputs are allocated before anything is captured"
        self._feed.flush()
        self._is_ready = False
        compiled, _ = self._compile(f"a step of {num_tokens} tokens", step)
        return Replay(compiled, self._feed)

    def run(self, name: str, function: Callable[..., T], *tensors: Tensor) -> T:
        """``function(*tensors)``, compiled once for each name and shapes.  The function may write to its
        arguments, and returns tensors that it computed."""
        key = (name, *((tensor.shape, tensor.dtype) for tensor in tensors))
        known = self._named.get(key)
        if known is not None:
            result: T = known(*tensors)
            return result
        compiled, result = self._compile(name, lambda: function(*tensors), tensors)
        self._named[key] = _Function(compiled, tensors)
        return result

    def _compile(
        self, name: str, step: Callable[[], T], tensors: Sequence[Tensor] | None = None
    ) -> tuple[Compiled[T], T]:
        """Also what the first run returned.  ``tensors`` is all that a small program reads or writes."""
        calls: list[tuple[Any, Sequence[Any], Sequence[Any]]] = []
        lookup = torch._dynamo.lookup_backend(self._compiler)

        def record(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
            run = lookup(graph, examples)

            def first(*arguments: Any) -> Any:
                outputs = run(*arguments)
                calls.append((run, arguments, outputs))
                return outputs

            return first

        traced = _own_code(step)
        began = time.perf_counter()
        try:
            result = torch.compile(
                traced, backend=record, fullgraph=True, dynamic=False, options={"guard_filter_fn": _no_guards}
            )()
        finally:
            # Nobody calls it again, and Dynamo's cache of it would keep the program and the step's tensors for the
            # life of the process: a code object and what Dynamo made of it hold each other, unseen by Python's gc.
            torch._dynamo.eval_frame.remove_from_cache(traced)
        taken = time.perf_counter() - began
        assert len(calls) == 1, f"{name} became {len(calls)} graphs"
        self._count(name, taken)
        # What Dynamo still keeps of the compiler has this list: the tensors in it are not to live as long.
        return Compiled(*calls.pop(), result), result

    def _count(self, name: str, seconds: float) -> None:
        self.compiles += 1
        self.compile_s += seconds
        if self._is_ready:
            self.late_compiles += 1
            log.warning("%s was compiled while serving, in %.2f s: its shape is in no bucket", name, seconds)


class _Function(Generic[T]):
    """A compiled function of tensors, called on others of the same shapes."""

    def __init__(self, compiled: Compiled[T], tensors: Sequence[Tensor]) -> None:
        self._compiled = compiled
        self._places = [compiled.places_of(tensor) for tensor in tensors]
        for places in self._places:
            compiled.forget(places)

    def __call__(self, *tensors: Tensor) -> T:
        replaced = [(place, tensor) for places, tensor in zip(self._places, tensors, strict=True) for place in places]
        return self._compiled(replaced)


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    """Which to keep.  Dynamo never frees those that watch something that lives as long as the process."""
    return [False] * len(guards)


def _own_code(step: Callable[[], T]) -> Callable[[], T]:
    """A function with a code object of its own: Dynamo counts what it compiled for each code object."""

    def traced() -> T:
        return step()

    code = traced.__code__.replace(co_name="compiled_step")
    return types.FunctionType(code, traced.__globals__, "compiled_step", None, traced.__closure__)
