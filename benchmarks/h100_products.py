"""Products of an 8B layer: the library's own choice beside every algorithm that its heuristics offer.

    python benchmarks/h100_products.py --out h100_products.json [--rows 32,128,8192]

bf16, microseconds of one call within a captured graph over copies of the weight that leave the cache.
cuBLASLt is called through ctypes; an algorithm is named by its configuration, so that it can be found again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import WEIGHTS, Timed, device, random, timed_us, weight_copies

LIBRARY = "libcublasLt.so.13"
ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 2048, 8192)
WORKSPACE_BYTES = 64 * 2**20
MOST_ALGORITHMS = 40
BF16, FLOAT32, COMPUTE_FLOAT32 = 14, 0, 68  # cudaDataType_t, cublasComputeType_t
TRANSPOSE_A = 3  # cublasLtMatmulDescAttributes_t
MOST_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t
CONFIGURATION = (
    ("id", 4), ("tile", 4), ("split_k", 4), ("reduction", 4), ("swizzle", 4), ("custom", 4), ("stages", 4),
    ("inner", 2), ("cluster", 2),
)  # fmt: skip
"""Attributes of an algorithm in the library's order, and their bytes."""


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def _call(function: Any, *arguments: Any) -> None:
    if (status := function(*arguments)) != 0:
        raise RuntimeError(f"{function.__name__} returned {status}")


@dataclass
class Library:
    lt: ctypes.CDLL
    handle: ctypes.c_void_p
    workspace: torch.Tensor

    @classmethod
    def open(cls) -> Library:
        lt, handle = ctypes.CDLL(LIBRARY), ctypes.c_void_p()
        _call(lt.cublasLtCreate, ctypes.byref(handle))
        return cls(lt, handle, torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device()))


class Product:
    """``x @ weight.T`` of one shape.  The library counts by columns: its result is [out, rows], and the weight is A."""

    def __init__(self, library: Library, rows: int, out_features: int, in_features: int) -> None:
        self._library, lt = library, library.lt
        self._describe = ctypes.c_void_p()
        _call(lt.cublasLtMatmulDescCreate, ctypes.byref(self._describe), COMPUTE_FLOAT32, FLOAT32)
        yes = ctypes.c_int(1)
        size = ctypes.c_size_t(4)
        _call(lt.cublasLtMatmulDescSetAttribute, self._describe, TRANSPOSE_A, ctypes.byref(yes), size)
        self._weight = self._layout(in_features, out_features)
        self._x = self._layout(in_features, rows)
        self._out = self._layout(out_features, rows)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)

    def _layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        _call(self._library.lt.cublasLtMatrixLayoutCreate, ctypes.byref(layout), BF16, *sizes)
        return layout

    def algorithms(self) -> list[_Heuristic]:
        lt, preference = self._library.lt, ctypes.c_void_p()
        _call(lt.cublasLtMatmulPreferenceCreate, ctypes.byref(preference))
        most, size = ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_size_t(8)
        _call(lt.cublasLtMatmulPreferenceSetAttribute, preference, MOST_WORKSPACE, ctypes.byref(most), size)
        found, count = (_Heuristic * MOST_ALGORITHMS)(), ctypes.c_int()
        _call(
            lt.cublasLtMatmulAlgoGetHeuristic, self._library.handle, self._describe, self._weight, self._x, self._out,
            self._out, preference, MOST_ALGORITHMS, found, ctypes.byref(count),
        )  # fmt: skip
        return [found[index] for index in range(count.value)]

    def configuration(self, algorithm: _Heuristic) -> dict[str, int]:
        values = {}
        for attribute, (name, size) in enumerate(CONFIGURATION):
            value, written = ctypes.c_uint64(0), ctypes.c_size_t()
            known = self._library.lt.cublasLtMatmulAlgoConfigGetAttribute(
                ctypes.byref(algorithm.algorithm), attribute, ctypes.byref(value), ctypes.c_size_t(size),
                ctypes.byref(written),
            )  # fmt: skip
            values[name] = int(value.value) if known == 0 else -1
        return values

    def run(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, algorithm: _Heuristic) -> None:
        library = self._library
        stream = torch.cuda.current_stream().cuda_stream
        _call(
            library.lt.cublasLtMatmul, library.handle, self._describe, ctypes.byref(self._one),
            ctypes.c_void_p(weight.data_ptr()), self._weight, ctypes.c_void_p(x.data_ptr()), self._x,
            ctypes.byref(self._zero), ctypes.c_void_p(out.data_ptr()), self._out, ctypes.c_void_p(out.data_ptr()),
            self._out, ctypes.byref(algorithm.algorithm), ctypes.c_void_p(library.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_void_p(stream),
        )  # fmt: skip


def timed(product: Callable[[torch.Tensor], Any], weights: list[torch.Tensor]) -> float:
    return round(timed_us(Timed([partial(product, weight) for weight in weights])), 2)


def record(library: Library, name: str, rows: int, weights: list[torch.Tensor]) -> dict[str, Any]:
    out_features, in_features = WEIGHTS[name]
    x, out = random(rows, in_features), torch.empty(rows, out_features, dtype=torch.bfloat16, device=device())
    expected = torch.nn.functional.linear(x, weights[0]).float()
    product, algorithms = Product(library, rows, out_features, in_features), []
    for algorithm in product.algorithms():
        configuration = product.configuration(algorithm)
        product.run(x, weights[0], out, algorithm)
        error = ((out.float() - expected).norm() / expected.norm()).item()
        assert error < 0.01, (name, rows, configuration, error)
        run = partial(product.run, x, out=out, algorithm=algorithm)
        algorithms.append({"us": timed(run, weights), **configuration})
    return {
        "weight": name,
        "rows": rows,
        "library_us": [timed(partial(torch.nn.functional.linear, x), weights) for _ in range(2)],
        "heuristic_first_us": algorithms[0]["us"],
        "algorithms": sorted(algorithms, key=lambda item: item["us"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("h100_products.json"))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library, found = Library.open(), []
    for name, sizes in WEIGHTS.items():
        weights = weight_copies(sizes, False)
        for rows in map(int, arguments.rows.split(",")):
            found.append(record(library, name, rows, weights))
            print(name, rows, found[-1]["library_us"], found[-1]["algorithms"][0], flush=True)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "records": found}
    arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
