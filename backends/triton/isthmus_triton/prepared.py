"""Launching a kernel that was launched before, without what Triton does anew at every launch.

Triton binds the arguments by name, works out what each of them specialises, and writes that out as
text to look the compiled kernel up by.  A step launches hundreds of kernels, so that all this takes
longer than a small step takes the device.  Here the compiled kernel is found by what the
compilation may depend on: each tensor's dtype and alignment, each integer's divisibility, the
number one, and everything given by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor
from triton.runtime import JITFunction

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGNED: Final = 16
"""Bytes, or a factor of an integer, that Triton makes use of."""
WIDEST: Final = 2**31
"""Integers from here on are passed in 64 bits."""


class PreparedLaunches:
    """Compiled kernels by what they were compiled for.  The first argument of every launch is a tensor."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Known] = {}

    def launcher(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        """What to call with the kernel's arguments: tensors and numbers by place, the rest by name."""
        if not isinstance(kernel, JITFunction):  # interpreted
            return kernel[grid]  # type: ignore[no-any-return]
        return partial(self._launch, kernel, grid)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        # The kernel's own hash is that of its source, behind a lock.
        key = (id(kernel), arguments[0].get_device(), *named, *named.values(), *_kinds(arguments))
        known = self._known.get(key)
        if known is None:
            # Triton returns what it has compiled, or found, and launched.
            compiled = kernel[grid](*arguments, **named)
            if compiled is not None:
                self._known[key] = _Known(kernel, compiled, _rest(kernel, len(arguments), named))
        else:
            known.compiled[(*grid, 1, 1)](*arguments, *known.rest)


@dataclass(frozen=True, slots=True)
class _Known:
    kernel: Any
    """Kept alive, since it is known by its identity."""
    compiled: Any
    rest: tuple[Any, ...]
    """What Triton expects after the arguments given by place."""


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    kinds: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            dtype = argument.dtype
            kinds.append(dtype if argument.data_ptr() % ALIGNED == 0 else (dtype, "unaligned"))
        elif isinstance(argument, int):
            divisible = argument % ALIGNED == 0
            kinds.append(divisible if 1 < argument < WIDEST else (divisible, argument == 1, argument >= WIDEST))
        else:
            kinds.append(type(argument))
    return kinds


def _rest(kernel: Any, given: int, named: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments given by name, in the kernel's order, with its defaults for those left out."""
    parameters = list(kernel.signature.parameters.values())[given:]
    return tuple(named.get(parameter.name, parameter.default) for parameter in parameters)
