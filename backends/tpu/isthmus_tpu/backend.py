"""Opening a TPU, by the route whose software is installed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final

import torch

from isthmus.contract import Backend, Capabilities, DeviceInfo
from isthmus.errors import BackendUnavailable
from isthmus_static.backend import StaticBackend, Target
from isthmus_static.options import require_known, with_buckets
from isthmus_static.xla_programs import XlaMemory, XlaPrograms
from isthmus_tpu import artefacts, in_place, sdk
from isthmus_tpu.capabilities import capabilities_of
from isthmus_tpu.memory import TpuMemory
from isthmus_tpu.sdk import Route, Sdk

PRODUCTS: Final = ("highest", "default")
"""Of the option ``float32_products``: six passes of bfloat16 through the matrix unit, which is float32; or one."""
LANES: Final = 128
"""A TPU holds arrays in tiles of 128 numbers by some rows.  Heads side by side, filled up to whole tiles, take no more
memory than their numbers for any number of heads and any size; [slots, kv_heads, head_dim] is laid out transposed for
small ones, and then every step copies the whole cache."""

log = logging.getLogger(__name__)


def open_backend(device: DeviceInfo, options: Mapping[str, Any]) -> Backend:
    """``options`` are the buckets of :mod:`isthmus_static.options` and ``float32_products``.

    Raises :class:`isthmus.errors.BackendError` for an option that there is not, and
    :class:`BackendUnavailable` where Google's software is gone or does not start.
    """
    require_known("tpu", options, {"float32_products": PRODUCTS})
    capabilities = with_buckets(capabilities_of(device), options)
    found = sdk.find()
    log.info("tpu: %s, because %s", found.route, found.reason)
    artefacts.configure(found, os.environ)
    make = _over_torch_tpu if found.route is Route.TORCH_TPU else _over_torch_xla
    return StaticBackend(make(found, device, capabilities, options.get("float32_products", PRODUCTS[0])))


def _over_torch_tpu(found: Sdk, device: DeviceInfo, capabilities: Capabilities, products: str) -> Target:
    if not sdk.load_torch_tpu():
        raise BackendUnavailable(f"torch_tpu {found.version} finds no TPU any more; see `isthmus backends`")
    compiler = in_place.register()
    # "medium", torch's word for it, is torch_tpu's default.
    torch.set_float32_matmul_precision("highest" if products == "highest" else "medium")
    where = torch.device("tpu", device.index)
    memory = TpuMemory(where, host=device.host)
    if compiler == in_place.NAME:
        graphs = "one program for each shape, by torch_tpu's compiler; what a step writes is donated"
    else:
        graphs = (
            f"one program for each shape, by torch_tpu's compiler as it stands: torch_tpu {found.version} has not what "
            f"{sdk.TESTED} lets donate by, so that each step copies the KV cache"
        )
        log.warning("tpu: %s", graphs)
    return Target(
        name="tpu",
        device=device,
        capabilities=capabilities,
        torch_device=where,
        compiler=compiler,
        providers=_providers(found, products) | {"graphs": graphs, "artefacts": _artefacts_of_torch_tpu(os.environ)},
        slot_multiple=LANES,
        allocates_late=True,
        memory=memory,
        on_close=memory.synchronize,
    )


def _over_torch_xla(found: Sdk, device: DeviceInfo, capabilities: Capabilities, products: str) -> Target:
    if not found.rehearsal:
        os.environ.setdefault("PJRT_DEVICE", "TPU")
    from isthmus_static import xla

    folder = artefacts.usable(artefacts.folder_of(found, os.environ))
    try:
        kept = folder is not None and xla.keep_executables(folder)
        where = xla.device()
    except Exception as error:  # torch_xla raises whatever the platform's plugin does
        raise BackendUnavailable(
            f"torch_xla does not start {os.environ['PJRT_DEVICE']} ({' '.join(str(error).split())}); it needs libtpu "
            f"of the extra [tpu-xla], and a TPU that no other process has"
        ) from error
    _set_products(products)
    graphs = "one program for each shape, through torch_xla's `openxla`; state is written in place by donation"
    said = f"on disk in {folder}, read again at the next start" if kept else "none: compiled at each start"
    return Target(
        name="tpu",
        device=device,
        capabilities=capabilities,
        torch_device=where,
        compiler="openxla",
        providers=_providers(found, products) | {"graphs": graphs, "artefacts": said},
        slot_multiple=LANES,
        memory=XlaMemory(where),
        programs=XlaPrograms(),
    )


def _set_products(products: str) -> None:
    """``torch_xla.backends.set_mat_mul_precision``, which logs a warning at each call, without that."""
    import torch_xla

    torch_xla._XLAC._xla_set_mat_mul_precision(products)


def _providers(found: Sdk, products: str) -> dict[str, str]:
    exact = "in six passes of bfloat16, as exact as float32" if products == "highest" else "in one pass of bfloat16"
    return {
        "route": f"{found.route}: {found.reason}",
        "attention": "matrix products over gathered blocks, in static shapes",
        "attention kernel": (
            "none serves: the one in isthmus_tpu.kernels (Pallas) was compiled for TPUs and interpreted; it never ran "
            "on one, nor from a graph of torch's"
        ),
        "products of float32": f"{exact}; attention's among them",
    }


def _artefacts_of_torch_tpu(environment: Mapping[str, str]) -> str:
    if artefacts.ROOT not in environment:
        return f"none: no folder could be made; set XDG_CACHE_HOME or {artefacts.ROOT}"
    return f"on disk in {environment[artefacts.ROOT]}, read again at the next start"
