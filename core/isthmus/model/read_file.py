"""Reads stretches of files into tensors, with several threads.

A mapped file would be simpler, but faults page by page, and each page counts as the process's memory.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from isthmus.errors import ModelError

PIECE_BYTES: Final = 8 * 2**20
MAX_THREADS: Final = 4
"""Two saturate most disks and memory; more only help where both are wide."""


class FileReader:
    """Owns threads until :meth:`close`, and for each a buffer of ``PIECE_BYTES`` where one is needed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="read-weights")
        self._local = threading.local()

    def read_into(self, destination: Tensor, path: Path, offset: int, dtype: torch.dtype) -> None:
        """Fill ``destination``, contiguous, with as many elements of ``dtype`` from byte ``offset`` on.

        Bytes go straight to their place on a host in the same dtype; otherwise through a buffer, piece by piece,
        casting on the way.  Raises :class:`ModelError` naming the file if it ends early or cannot be read.
        """
        flat = destination.view(-1)
        step = PIECE_BYTES // dtype.itemsize
        read = self._read_direct if flat.device.type == "cpu" and flat.dtype == dtype else self._read_buffered
        if flat.numel() <= step:
            read(flat, path, offset, dtype)
            return
        starts = range(0, flat.numel(), step)
        jobs = [
            self._pool.submit(read, flat[at : at + step], path, offset + at * dtype.itemsize, dtype) for at in starts
        ]
        for job in jobs:
            job.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read_direct(self, destination: Tensor, path: Path, offset: int, _dtype: torch.dtype) -> None:
        _read_bytes(destination.view(torch.uint8), path, offset)

    def _read_buffered(self, destination: Tensor, path: Path, offset: int, dtype: torch.dtype) -> None:
        piece = self._buffer(destination.device)[: destination.numel() * dtype.itemsize]
        _read_bytes(piece, path, offset)
        with torch.inference_mode(destination.is_inference()):
            destination.copy_(piece.view(dtype))

    def _buffer(self, device: torch.device) -> Tensor:
        """This thread's buffer, page-locked for a device apart from the host where torch can do that."""
        buffer: Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
            if device.type != "cpu" and torch.accelerator.is_available():
                with suppress(RuntimeError):  # a runtime that cannot lock pages: the copy waits instead
                    buffer = buffer.pin_memory()
            self._local.buffer = buffer
        return buffer


def _read_bytes(destination: Tensor, path: Path, offset: int) -> None:
    view = memoryview(destination.numpy().data)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ModelError(f"{path} ends {len(view)} bytes early; fetch it again")
                view = view[count:]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
