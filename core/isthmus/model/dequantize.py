"""GGUF's quantised blocks to floats, on any torch device.

Layouts are those of ggml's ``ggml-quants.c``; each function takes the bytes of whole blocks, uint8
[blocks, block_bytes], and returns float32 [blocks, block_size].  Types without a function here go through the
``gguf`` package's numpy code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

HOST_PIECE: Final = 2**15 - 1
"""Elements dequantised at a time: what is in between stays in a core's cache, and torch starts no threads, which
on a busy machine wait for each other far longer than they work (seen: 10 s for a model that takes 0.6 s)."""
LARGE: Final = 2**24
"""Elements from which on a tensor on a host is worth torch's threads, in pieces of ``LARGE_PIECE``."""
LARGE_PIECE: Final = 2**20
DEVICE_PIECE: Final = 2**23
"""The same on a device, where launches would cost more than the work."""


def dequantize_into(destination: Tensor, raw: Tensor, type_name: str, type_number: int, block_bytes: int) -> None:
    """Fill ``destination`` [rows, columns] (rows may be strided) from ``raw``, uint8 [rows, row_bytes].

    Both are on one device.  Never holds more than a piece in floats besides.
    """
    convert = PLAIN.get(type_name)
    if convert is not None:
        destination.copy_(raw.view(convert))
        return
    function = BLOCKS.get(type_name) or _by_package(type_number)
    rows_a_piece = max(1, _piece(destination) // destination.shape[1])
    for start in range(0, raw.shape[0], rows_a_piece):
        rows = raw[start : start + rows_a_piece]
        values = function(rows.reshape(-1, block_bytes))
        destination[start : start + rows_a_piece].copy_(values.view(rows.shape[0], -1))


def _piece(destination: Tensor) -> int:
    if destination.device.type != "cpu":
        return DEVICE_PIECE
    return HOST_PIECE if destination.numel() < LARGE else LARGE_PIECE


def _by_package(type_number: int) -> Callable[[Tensor], Tensor]:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    def convert(blocks: Tensor) -> Tensor:
        values = dequantize(blocks.cpu().numpy(), GGMLQuantizationType(type_number))
        return torch.from_numpy(values).to(blocks.device)

    return convert


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Low four bits of all bytes, then high ones, along the last dimension."""
    packed = packed.contiguous()
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits from byte ``at`` on, least significant first, as 16 or 0."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[:, at : at + 4, None] >> shifts) & 1
    return bits.reshape(-1, 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8.0).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float().sub_(16.0).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return quants.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits in 12 bytes: float32 [blocks, 8, 1] each."""
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 2) & 48)], dim=-1)
    minima = torch.cat([high & 63, (rest >> 4) | ((high >> 2) & 48)], dim=-1)
    return scales.float()[:, :, None], minima.float()[:, :, None]


def _k_blocks(blocks: Tensor, quants: Tensor) -> Tensor:
    """``quants`` [blocks, 8, 32] with the scales and minima that Q4_K and Q5_K share."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0)[:, :, None], _half(blocks, 2)[:, :, None]
    return quants.float().mul_(scale * scales).sub_(minimum * minima).view(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_blocks(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1
    return _k_blocks(blocks, _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32) | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    quants = (low | (high << 4)).view(-1, 16, 16).float().sub_(32.0)
    scales = blocks[:, 192:208].view(torch.int8).float()[:, :, None]
    return quants.mul_(_half(blocks, 208)[:, :, None] * scales).view(-1, 256)


PLAIN: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
