"""What people write on a command line, as numbers."""

from __future__ import annotations

import re
from typing import Final

import typer

_UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE: Final = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})")
_COUNT_UNITS: Final = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}
_COUNT: Final = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([kKmM]?)")


def size_bytes(text: str) -> int:
    """``4GiB``, ``512MB``, ``1.5g`` or a plain number of bytes."""
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise typer.BadParameter(f"{text!r} is no size; write bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    size = int(float(found[1]) * unit)
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is {size} bytes; give more than 0")
    return size


def token_count(text: str) -> int:
    """``4096``, ``32k`` (32,000) or ``32K`` (32,768)."""
    found = _COUNT.fullmatch(text.strip())
    count = int(float(found[1]) * _COUNT_UNITS[found[2]]) if found else 0
    if count <= 0:
        raise typer.BadParameter(f"{text!r} is no number of tokens; write 4096, 32k (32000) or 32K (32768)")
    return count


def share(text: str) -> float:
    """More than 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text!r} is no share; write a number over 0 and up to 1, such as 0.9")
    return value


def key_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise typer.BadParameter(f"{text!r} is no setting; write name=value")
    return name.strip(), value.strip()
