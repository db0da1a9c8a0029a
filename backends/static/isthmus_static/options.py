"""Backend options that every compiled device takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from isthmus.contract import Capabilities
from isthmus.errors import BackendError

BUCKETS: Final = ("token_buckets", "span_buckets", "block_buckets")


def with_buckets(capabilities: Capabilities, options: Mapping[str, Any]) -> Capabilities:
    """``capabilities`` with the buckets that ``options`` name, such as ``span_buckets=1,8,64``.

    Fewer buckets are compiled sooner and padded more.  Raises :class:`BackendError` for what is no
    list of positive numbers.
    """
    return replace(capabilities, **{name: _sizes(name, options[name]) for name in BUCKETS if name in options})


def require_known(backend: str, options: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise :class:`BackendError` for an option that is neither a bucket nor in ``known``, or for a value that
    ``known`` does not list."""
    names = sorted({*BUCKETS, *known})
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise BackendError(f"the {backend} backend has no option {', '.join(unknown)}; it takes {', '.join(names)}")
    for name, values in known.items():
        if values and options.get(name, values[0]) not in values:
            raise BackendError(
                f"the {backend} backend's option {name} is {options[name]!r}; it must be {' or '.join(values)}"
            )


def _sizes(name: str, text: Any) -> tuple[int, ...]:
    try:
        sizes = sorted({int(part) for part in str(text).split(",") if part.strip()})
    except ValueError:
        sizes = []
    if (not sizes and name != "block_buckets") or (sizes and sizes[0] < 1):
        raise BackendError(f"the option {name} is {text!r}; it must be positive numbers with commas between them")
    return tuple(sizes)
