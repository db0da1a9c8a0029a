"""Weight files behind one interface: names, shapes, and reading a tensor into its place.

A tensor is read from the disk as it is put in its place; no other copy of it is held in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model.dequantize import dequantize_into
from isthmus.model.gguf_file import GgufFile, GgufTensor, open_gguf
from isthmus.model.layout import Part, Shape
from isthmus.model.read_file import FileReader
from isthmus.model.source import ModelSource, read_json

INDEX: Final = "model.safetensors.index.json"
FLOATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(Protocol):
    @property
    def where(self) -> str:
        """The file or folder, for errors."""
        ...

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor's shape by name."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor takes on the disk."""
        ...

    def read_into(self, destination: Tensor, part: Part) -> None:
        """Fill ``destination``, of the part's shape, casting to its dtype on the way."""
        ...

    def close(self) -> None: ...


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Raises :class:`ModelError` naming the file that is missing, cut off or not what it should be."""
    if source.kind == "gguf":
        return GgufCheckpoint(open_gguf(source.path))
    return SafetensorsCheckpoint(source.path)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor's bytes are."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype


class SafetensorsCheckpoint:
    """One file, or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        index = folder / INDEX
        listed = read_json(index).get("weight_map") if index.is_file() else None
        if index.is_file() and not isinstance(listed, dict):
            raise ModelError(f"{index} lacks 'weight_map', which names each tensor's file")
        self._stored: dict[str, _Stored] = {}
        for path in _shards(folder, listed):
            self._stored.update(_tensors_of(path))
        for name, file in (listed or {}).items():
            if name not in self._stored:
                raise ModelError(f"{folder / file} lacks the tensor {name}, which {INDEX} says it holds")
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self._reader = FileReader()

    def nbytes(self, name: str) -> int:
        stored = self._stored[name]
        return math.prod(stored.shape) * stored.dtype.itemsize

    def read_into(self, destination: Tensor, part: Part) -> None:
        assert not part.rotary_heads, "only GGUF has the interleaved order"
        stored = self._stored[part.name]
        self._reader.read_into(destination, stored.path, stored.offset, stored.dtype)

    def close(self) -> None:
        self._reader.close()


def _tensors_of(path: Path) -> dict[str, _Stored]:
    """The header of one file, after the library has checked that it and the file's length agree."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in FLOATS:
            raise UnsupportedModel(
                f"{path}: tensor {name} is {entry['dtype']}; supported are {', '.join(FLOATS)} (unquantised)"
            )
        offset = 8 + length + int(entry["data_offsets"][0])
        found[name] = _Stored(path, offset, tuple(entry["shape"]), FLOATS[entry["dtype"]])
    return found


def _shards(folder: Path, listed: Mapping[str, Any] | None) -> list[Path]:
    if listed is not None:
        files = sorted({str(file) for file in listed.values()})
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise ModelError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of its own folder")
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} of {len(files)} weight files, such as {missing[0]}")
        return [folder / file for file in files]
    found = sorted(folder.glob("*.safetensors"))
    whole = [f for f in found if f.name == "model.safetensors"] or found
    if len(whole) == 1:
        return whole
    if found:
        raise ModelError(f"{folder} holds {len(found)} safetensors files but no {INDEX} to say what is in which")
    if any(folder.glob("*.bin")):
        raise ModelError(f"{folder} holds only pickled weights (*.bin), which are never read; convert to safetensors")
    raise ModelError(f"{folder} holds no *.safetensors file; is the download complete?")


class GgufCheckpoint:
    """A GGUF file; quantised tensors are dequantised on the destination's device."""

    def __init__(self, file: GgufFile) -> None:
        self.where = str(file.path)
        self.shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in file.tensors.items()}
        self._file = file

    def nbytes(self, name: str) -> int:
        return self._file.tensors[name].nbytes

    def read_into(self, destination: Tensor, part: Part) -> None:
        tensor = self._file.tensors[part.name]
        raw = torch.from_numpy(self._file.raw(part.name)).to(destination.device)
        if destination.dim() > 2:
            for expert, rows in zip(destination, raw.chunk(destination.shape[0]), strict=True):
                _dequantise(expert, rows, tensor)
        elif not part.rotary_heads:
            _dequantise(destination.view(-1, tensor.shape[-1]), raw, tensor)
        elif destination.dim() == 2:
            reordered = raw.view(part.rotary_heads, -1, 2, raw.shape[1]).transpose(1, 2).reshape(raw.shape)
            _dequantise(destination, reordered, tensor)
        else:
            values = torch.empty_like(destination)
            _dequantise(values[None], raw, tensor)
            destination.view(part.rotary_heads, 2, -1).copy_(values.view(part.rotary_heads, -1, 2).transpose(1, 2))

    def close(self) -> None:
        """The mapping goes with the last view of it."""


def _dequantise(destination: Tensor, raw: Tensor, tensor: GgufTensor) -> None:
    dequantize_into(destination, raw, tensor.type_name, tensor.type_number, tensor.block_bytes)
