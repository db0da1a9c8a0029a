"""Reads a GGUF file's metadata and finds its tensors.  Imports no torch.

The ``gguf`` package's own reader takes seconds for a vocabulary's worth of strings, since it makes an array of
each; this one takes a twentieth.  Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import ModelError, UnsupportedModel

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
STRING: Final = 8
ARRAY: Final = 9
SCALARS: Final[Mapping[int, str]] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
MAX_DIMENSIONS: Final = 4
MAX_ALIGNMENT: Final = 2**20
MAX_NESTING: Final = 4

BLOCKS: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Type number: name, elements a block, bytes a block.  Others are looked up in the ``gguf`` package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor is.  ``shape`` has the slowest dimension first, as torch has it."""

    shape: tuple[int, ...]
    type_number: int
    type_name: str
    block_size: int
    block_bytes: int
    offset: int
    """Bytes from the start of the file."""

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block_size * self.block_bytes

    @property
    def nbytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """``metadata`` holds Python scalars, strings, lists of strings, and numpy arrays of numbers."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: mmap.mmap

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, [rows, row_bytes]: a view of the file, never to be written to."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self.data, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(-1, tensor.row_bytes)

    def floats(self, name: str) -> tuple[float, ...] | None:
        """The values of a small float32 tensor, ``None`` if there is none of that name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type_name != "F32":
            raise ModelError(f"{self.path}: tensor {name!r} is {tensor.type_name}; it must be F32")
        return tuple(self.raw(name).view("<f4").ravel().tolist())


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file.  Raises :class:`ModelError` if it is cut off, not GGUF, or of an unknown version."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    try:
        return _Cursor(path, data).read_file()
    except (struct.error, UnicodeDecodeError, ValueError, IndexError, OverflowError) as error:
        raise ModelError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error


class _Cursor:
    """Walks the header from its start."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def read_file(self) -> GgufFile:
        if self.data[:4] != MAGIC:
            raise ModelError(f"{self.path} does not begin with {MAGIC.decode()!r}: it is not a GGUF file")
        (version,) = struct.unpack_from("<I", self.data, 4)
        if version not in VERSIONS:
            raise UnsupportedModel(f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) are known")
        num_tensors, num_values = struct.unpack_from("<QQ", self.data, 8)
        self.at = 24
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {name: self._place(name, shape, kind, start + offset) for name, shape, kind, offset in found}
        return GgufFile(self.path, metadata, tensors, self.data)

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return int(value)

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        self.at = start + length
        if self.at > len(self.data):
            raise ValueError("a string reaches past the end")
        return str(self.data[start : self.at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array(MAX_NESTING)
        return self._scalars(kind, 1)[0].item()

    def _scalars(self, kind: int, count: int) -> NDArray[Any]:
        if kind not in SCALARS:
            raise ValueError(f"metadata type {kind} is unknown")
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values

    def _array(self, depth: int) -> Any:
        if not depth:
            raise ValueError(f"arrays are nested more than {MAX_NESTING} deep")
        kind, count = self._number("<I"), self._number("<Q")
        if kind == STRING:
            return self._strings(count)
        if kind == ARRAY:
            return [self._array(depth - 1) for _ in range(count)]
        return self._scalars(kind, count)

    def _strings(self, count: int) -> list[str]:
        """As ``_string``, unrolled: vocabularies have hundreds of thousands."""
        data, at, end = self.data, self.at, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > end:
                raise ValueError("a string reaches past the end")
            strings.append(str(data[start:at], "utf-8", "replace"))
        self.at = at
        return strings

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("<I"), self._number("<Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        type_name, block_size, block_bytes = BLOCKS.get(kind) or _rare_type(kind, name, self.path)
        if not shape or shape[-1] % block_size:
            raise ValueError(f"tensor {name!r} has the shape {shape}, which {type_name} cannot hold")
        tensor = GgufTensor(
            shape=shape,
            type_number=kind,
            type_name=type_name,
            block_size=block_size,
            block_bytes=block_bytes,
            offset=offset,
        )
        if offset + tensor.nbytes > len(self.data):
            raise ValueError(f"tensor {name!r} reaches {offset + tensor.nbytes - len(self.data)} bytes past the end")
        return tensor


def _rare_type(kind: int, name: str, path: Path) -> tuple[str, int, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        block_size, block_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{path}: tensor {name!r} has the type number {kind}, which is not known") from error
    return known.name, block_size, block_bytes
