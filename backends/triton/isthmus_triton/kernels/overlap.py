"""Letting a kernel begin while the one before it ends, on devices that can.

A kernel launched with :func:`overlapping` may start before its predecessor has ended.  It calls
:func:`await_previous` before it touches anything that another kernel writes or reads; weights it may
load, or :func:`ask_for`, earlier.  Then it calls :func:`let_next_begin`, so that at most one successor waits at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ask_for(pointers):
    """Begin to read the 128 bytes at each of ``pointers`` into the device's cache, and go on."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


def overlapping(overlap: bool) -> dict[str, bool]:
    """Launch options; empty where kernels follow one another as usual."""
    return {"launch_pdl": True} if overlap else {}
