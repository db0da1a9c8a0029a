"""Kernels against their torch references: in Triton's interpreter, or on a device.

Without ``ISTHMUS_KERNEL_DEVICE`` everything is interpreted on the CPU, so this folder must be
collected before anything else imports ``isthmus_triton``.  ``ISTHMUS_KERNEL_DEVICE=cuda`` compiles and
runs the same tests on a device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import pytest

DEVICE = os.environ.get("ISTHMUS_KERNEL_DEVICE", "cpu")
if DEVICE == "cpu":
    # Triton's own library is decorated when it is imported.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before tests/kernels could choose its interpreter; run this folder by itself"
    )
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

pytest.importorskip("triton", reason="the kernel library needs triton")


def _patch_bf16() -> None:
    """Triton's interpreter keeps bf16 as uint16 and computes on the bit patterns; make it compute in
    fp32 and round back."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    def is_bf16(value: object) -> bool:
        return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16

    def up(value: object) -> object:
        if not is_bf16(value):
            return value
        return TensorHandle(_convert_float(value.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    def down(value: object) -> object:
        bits = value.data.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(rounded, tl.bfloat16)

    def wrap(name: str) -> None:
        plain = getattr(InterpreterBuilder, name)

        def wrapped(self: object, *args: object, **kwargs: object) -> object:
            if not any(is_bf16(value) for value in args):
                return plain(self, *args, **kwargs)
            result = plain(self, *map(up, args), **kwargs)
            if not isinstance(result, TensorHandle) or result.dtype.scalar != tl.float32:
                return result
            return down(result)

        setattr(InterpreterBuilder, name, wrapped)

    for name in ("binary_op", "unary_op", "create_fma"):
        wrap(name)
    plain_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, c, *rest: plain_dot(self, up(a), up(b), c, *rest)


def _patch_fp8() -> None:
    """Triton's interpreter loses the carry where rounding to 8 bits ends in the next power of two, and a NaN."""
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(data, source, target, rounding):  # type: ignore[no-untyped-def]
        if target != interpreter.tl.float8e4nv or source != interpreter.tl.float32:
            return plain(data, source, target, rounding)
        rounded = torch.from_numpy(data.copy()).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    interpreter._convert_float = convert


if DEVICE == "cpu":
    _patch_bf16()
    _patch_fp8()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def interpreted() -> bool:
    return DEVICE == "cpu"


@pytest.fixture(scope="session")
def arch() -> str:
    """Whose launch parameters to take: the smallest tiles where they are interpreted."""
    if DEVICE == "cpu":
        return ""
    if torch.version.hip is not None:
        pytest.skip("these take CUDA's launch parameters; `isthmus certify --device rocm` runs the parts with AMD's")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def attend_paged(
    query: torch.Tensor,  # [tokens, heads, head_dim]
    keys: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
    values: torch.Tensor,
    out: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],  # first token, its tokens, context
    block_tables: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    group = query.shape[1] // keys.shape[2]
    for table, (first, count, context) in zip(block_tables, spans, strict=True):
        queries = query[first : first + count].float()
        own = [cache[table.long()].flatten(0, 1)[:context].float() for cache in (keys, values)]
        k, v = (each.repeat_interleave(group, 1) for each in own)
        scores = torch.einsum("qhd,khd->hqk", queries, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(context - count, context)[:, None] - torch.arange(context)
        scores[:, (at < 0) | ((at >= window) if window else False)] = -torch.inf
        out[first : first + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)


@pytest.fixture(name="attend_paged")
def _attend_paged() -> Callable[..., None]:
    """What an attention library's function computes, in plain torch: stand-ins for one call it."""
    return attend_paged


@pytest.fixture
def eight_bits() -> None:
    """Skips where the device's compiler knows no 8-bit float of this kind."""
    if DEVICE != "cpu" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no float8_e4m3fn")
