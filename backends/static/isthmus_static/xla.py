"""Devices of torch_xla 2.9: TPUs by the older route, and Inferentia2 and Trn1.

torch_xla is imported when something is called, so that this module may be imported without it.  It
is the last release of its line, and pinned: :func:`compile_step` and :func:`lowered` use functions
of it that are not public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch.utils import _pytree as pytree

from isthmus.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

NO_DISK_CACHE: Final = frozenset({"CPU"})
"""Platforms whose runtime cannot read back an executable that it wrote."""


def device() -> torch.device:
    """The process's device, as torch names it: "xla:0".  The platform is what ``PJRT_DEVICE`` says."""
    import torch_xla

    where: torch.device = torch_xla.device()
    return where


def platform() -> str:
    """ "CPU", "TPU" or "NEURON"; starts nothing."""
    from torch_xla import runtime

    return str(runtime.device_type())


def keep_executables(folder: Path) -> bool:
    """Keep what is compiled in ``folder``, and take from it what is there; call before anything is computed.

    False where the platform cannot, and then nothing is written.
    """
    from torch_xla import runtime

    if platform() in NO_DISK_CACHE:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    runtime.initialize_cache(str(folder))
    return True


def compiles() -> int:
    """How many programs this process has compiled; those found on the disk or in memory do not count."""
    return _metric("CompileTime")[0]


def compile_s() -> float:
    """The time that took."""
    return _metric("CompileTime")[1] / 1e9


def uploads() -> int:
    """How many copies went from the host to the device."""
    return _metric("TransferToDeviceTime")[0]


def downloads() -> int:
    """How many copies came from the device to the host."""
    return _metric("TransferFromDeviceTime")[0]


def _metric(name: str) -> tuple[int, float]:
    from torch_xla.debug import metrics

    data = metrics.metric_data(name)
    return (0, 0.0) if data is None else (int(data[0]), float(data[1]))


def wait() -> None:
    """Run whatever is pending, and wait for the device."""
    import torch_xla
    from torch_xla.core import xla_model

    torch_xla.sync(wait=True)
    xla_model.wait_device_ops()


def memory_bytes(where: torch.device) -> tuple[int, int] | None:
    """Bytes in use and in all; ``None`` where the platform does not tell, as on a CPU."""
    from torch_xla.core import xla_model

    try:
        info = xla_model.get_memory_info(where)
    except RuntimeError:
        return None
    return int(info["bytes_used"]), int(info["bytes_limit"])


def buffer_address(tensor: Tensor) -> int:
    """Where the tensor's numbers are; equal before and after a step that wrote them in place.  Waits for the device."""
    import torch_xla
    from torch_xla.core import xla_model

    xla_model.wait_device_ops()
    address: int = torch_xla._XLAC._unsafe_buffer_pointer(tensor)
    return address


def donate(tensors: Iterable[Tensor]) -> None:
    """Let the next program compiled over these tensors write their new contents into the same memory.

    The mark lies on a tensor's present buffer and is lost when anything is computed into it, so it
    is set again before each compilation.  ``openxla`` copies each tensor whole in every step without.
    """
    _mark(tensors, donated=True)


def _mark(tensors: Iterable[Tensor], *, donated: bool) -> None:
    for tensor in tensors:
        torch.ops.xla.dynamo_set_buffer_donor_(tensor, donated)


def compile_step(
    step: Callable[[], T], inputs: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[Callable[..., list[Tensor]], list[Tensor], list[Tensor], T]:
    """Compile ``step`` by running its Python once over tensors that only note what is done to them.

    torch.compile with ``openxla`` gives the same program, after tracing it three times.  ``step``
    reads ``inputs``, which are new in each step, may write ``state`` in place and nothing else, and
    returns tensors, alone or in tuples, lists and dicts.  ``state`` are whole tensors, not views,
    made outside inference mode (in which this may be called).  Every other tensor that ``step``
    reads is part of the program, by reference.

    Returns a function, the arguments for it (``inputs`` then ``state``), the tensors that its first
    run returned, and those as ``step`` arranged them.  Called with the arguments, inputs replaced by
    others of the same shapes, the function runs the program: no Python of ``step``, no guard.

    Raises :class:`Unsupported`, naming the operations, if some would run on the host, or if ``step``
    looks at a value.
    """
    from torch_xla._dynamo import dynamo_bridge

    arguments = [*inputs, *state]
    traced = _Traced(step, arguments, state)
    with _tracing(state):
        wait()
        donate(state)
        fallbacks, fetched = _fallbacks(), downloads()
        program = dynamo_bridge.extract_internal(traced)
    _refuse_host_work(fallbacks, fetched)

    def run(*tensors: Tensor) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            outputs = program(*tensors)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    outputs = run(*arguments)
    return run, arguments, outputs, traced.arranged(outputs)


@contextlib.contextmanager
def _tracing(state: Sequence[Tensor]) -> Iterator[None]:
    """Outside inference mode, in which torch_xla can neither view nor write tensors that were made outside."""
    assert not any(tensor.is_inference() for tensor in state), "what a step writes is made outside inference mode"
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Traced:
    """As much of a graph module as torch_xla's bridge looks at."""

    def __init__(self, step: Callable[[], Any], arguments: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self.xla_args = tuple(arguments)
        self._step = step
        self._state = list(state)
        self._structure: pytree.TreeSpec | None = None

    def parameters(self) -> Iterable[Tensor]:
        return ()

    def __call__(self, *_arguments: Tensor) -> list[Tensor]:
        leaves, self._structure = pytree.tree_flatten(self._step())
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves), "a compiled step returns tensors"
        self._spare_what_is_only_read()
        return leaves

    def _spare_what_is_only_read(self) -> None:
        """Its memory would be given to some result, and be lost."""
        import torch_xla

        written = torch_xla._XLAC._check_tensor_need_materialization(self._state)
        _mark(
            [tensor for tensor, is_written in zip(self._state, written, strict=True) if not is_written], donated=False
        )

    def arranged(self, outputs: Sequence[Tensor]) -> Any:
        assert self._structure is not None
        return pytree.tree_unflatten(list(outputs), self._structure)


def lowered(step: Callable[[], Any], state: Sequence[Tensor] = ()) -> str:
    """The HLO text of what ``step`` computes and of what it writes to ``state``; nothing is run.

    Raises as :func:`compile_step` does.
    """
    import torch_xla

    with _tracing(state):
        wait()
        kept = [tensor.clone() for tensor in state]
        fallbacks, fetched = _fallbacks(), downloads()
        leaves = [leaf for leaf in pytree.tree_leaves(step()) if isinstance(leaf, torch.Tensor)]
        try:
            _refuse_host_work(fallbacks, fetched)
            return str(torch_xla._XLAC._get_xla_tensors_hlo([*leaves, *state]))
        finally:
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
            torch_xla._XLAC._clear_pending_irs(str(device()))


def _fallbacks() -> dict[str, int]:
    """How often each operation ran on the host because the device has none."""
    from torch_xla.debug import metrics

    return {name: int(metrics.counter_value(name) or 0) for name in metrics.executed_fallback_ops()}


def _refuse_host_work(fallbacks_before: dict[str, int], downloads_before: int) -> None:
    new = [name for name, count in _fallbacks().items() if count > fallbacks_before.get(name, 0)]
    if new:
        raise Unsupported(
            f"a compiled step uses {', '.join(sorted(new))}, which torch_xla runs on the host; write it in other terms"
        )
    if downloads() > downloads_before:
        raise Unsupported("a compiled step looks at a value on the device; keep it a tensor, or give it from the host")
