"""Rotary settings of a ``config.json``, in either spelling, to :class:`RopeSpec`.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from isthmus.errors import ModelError, UnsupportedModel
from isthmus.model.spec import RopeSpec

KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""Kinds of scaling, and the numbers each cannot do without."""
ALIASES: Final = {"su": "longrope"}
LEAST: Final[Mapping[str, float]] = {
    "rope_theta": 1.001,
    "factor": 0.001,
    "short_factor": 0.001,
    "long_factor": 0.001,
    "original_max_position_embeddings": 2,
    "max_position_embeddings": 1,
}
"""Below these the formulas divide by zero."""
NOT_NUMBERS: Final = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_ropes(config: Mapping[str, Any], head_dim: int, where: str) -> tuple[tuple[RopeSpec, ...], int]:
    """A model's rotary embeddings, and which of them layers with a sliding window use.

    Raises :class:`ModelError` for numbers that are missing or not numbers, and
    :class:`UnsupportedModel` for a kind of scaling that is not known.
    """
    stated = _object(config, "rope_parameters", where) or _object(config, "rope_scaling", where)
    local_theta = config.get("rope_local_base_freq")
    if "full_attention" in stated or "sliding_attention" in stated:
        full, local = (_object(stated, kind, where) for kind in ("full_attention", "sliding_attention"))
        if local_theta is not None:
            local = {"rope_theta": local_theta, **local}
    elif local_theta is not None:
        full, local = stated, {"rope_theta": local_theta}
    else:
        return (_read_one(config, stated, head_dim, where),), 0
    return (_read_one(config, full, head_dim, where), _read_one(config, local, head_dim, where)), 1


def _object(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: {name!r} is {value!r}; it must be an object")
    return value


def _read_one(config: Mapping[str, Any], scaling: Mapping[str, Any], head_dim: int, where: str) -> RopeSpec:
    scaling = {name: value for name, value in scaling.items() if value is not None}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise UnsupportedModel(f"{where}: rotary scaling {kind!r} is not supported; supported: {', '.join(KINDS)}")
    theta = _number(scaling.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta", where)
    share = _number(
        scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)), "partial_rotary_factor", where
    )
    rotary_dim = int(head_dim * share)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ModelError(f"{where}: {rotary_dim} of {head_dim} dimensions of a head are rotated; it must be even")
    parameters: dict[str, float | tuple[float, ...]] = {}
    if kind != "default":
        parameters = _parameters(kind, config, scaling, where)
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if factors is not None and (not isinstance(factors, tuple) or len(factors) != rotary_dim // 2):
            raise ModelError(
                f"{where}: rotary {name!r} must list {rotary_dim // 2} numbers, half the rotated dimensions"
            )
    return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind=kind, parameters=parameters)


def _parameters(
    kind: str, config: Mapping[str, Any], scaling: Mapping[str, Any], where: str
) -> dict[str, float | tuple[float, ...]]:
    longest = _number(config.get("max_position_embeddings"), "max_position_embeddings", where)
    original = scaling.get("original_max_position_embeddings")
    if kind == "longrope":
        original = config.get("original_max_position_embeddings") or original
    read: dict[str, float | tuple[float, ...]] = {}
    for name, value in scaling.items():
        if name in NOT_NUMBERS:
            continue
        if isinstance(value, (list, tuple)):
            read[name] = tuple(_number(v, name, where) for v in value)
        else:
            read[name] = _number(value, name, where)
    read["max_position_embeddings"] = longest
    read["original_max_position_embeddings"] = _number(
        longest if original is None else original, "original_max_position_embeddings", where
    )
    for name in KINDS[kind]:
        if name not in read:
            raise ModelError(f"{where}: rotary scaling {kind!r} needs {name!r}, which is missing")
    return read


def _number(value: Any, name: str, where: str) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ModelError(f"{where}: rotary setting {name!r} is {value!r}; it must be a number of at least 0")
    if value < LEAST.get(name, 0):
        raise ModelError(f"{where}: rotary setting {name!r} is {value!r}; it must be at least {LEAST[name]}")
    return float(value)
