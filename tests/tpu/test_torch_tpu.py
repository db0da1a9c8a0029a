"""torch_tpu itself, with XLA's CPU client in a TPU's place: eager dispatch, compiler and buffers are its own."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)


def test_compiled_steps_decode_as_torch_does(torch_tpu_step: dict[str, Any]) -> None:
    for shape in (*torch_tpu_step["in_place"], torch_tpu_step["stock"]):
        assert shape["tokens_equal"], shape
        assert shape["key_error"] < 1e-4
        assert shape["distinct"] > shape["rows"], "the model repeats itself; the comparison says little"


def test_a_shape_is_compiled_once(torch_tpu_step: dict[str, Any]) -> None:
    assert [(shape["rows"], shape["programs"]) for shape in torch_tpu_step["in_place"]] == [(4, 1), (8, 2), (4, 2)]


def test_a_shape_that_depends_on_data_is_refused(torch_tpu_step: dict[str, Any]) -> None:
    assert torch_tpu_step["refused"] == "BackendCompilerFailed"


def test_donated_caches_are_updated_in_place(torch_tpu_step: dict[str, Any]) -> None:
    """Where torch_tpu's own backend copies the cache: if that changes, in_place.py has had its day."""
    update, stock = torch_tpu_step["update_in_place"], torch_tpu_step["update_stock"]
    cache = torch_tpu_step["cache_bytes"]
    assert torch_tpu_step["stablehlo"]["donated"] == torch_tpu_step["stablehlo"]["caches"]
    assert update["peak_bytes"] < cache / 2 < stock["peak_bytes"]
    assert update["seconds"] < stock["seconds"] / 4
