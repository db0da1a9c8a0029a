"""The contract's version, and what may meet what."""

from __future__ import annotations

from typing import Final, NamedTuple

from isthmus.errors import ContractMismatch


class ContractVersion(NamedTuple):
    """A major step breaks backends; a minor step only adds what has a default."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


CONTRACT_VERSION: Final = ContractVersion(1, 0)


def require_compatible(backend: str, theirs: tuple[int, int]) -> None:
    """Raise :class:`ContractMismatch` unless a backend written for ``theirs`` can be used.

    An older minor is served by defaults.  A newer minor may call what this core lacks, so it is
    refused, as is another major.
    """
    major, minor = theirs
    if major == CONTRACT_VERSION.major and minor <= CONTRACT_VERSION.minor:
        return
    newer = (major, minor) > CONTRACT_VERSION
    remedy = (
        "upgrade Isthmus: pip install -U isthmus-engine"
        if newer
        else f"upgrade the plugin that provides {backend!r} to one written for contract {CONTRACT_VERSION.major}.x"
    )
    raise ContractMismatch(
        f"backend {backend!r} is written for contract {major}.{minor}; this Isthmus speaks {CONTRACT_VERSION}; {remedy}"
    )
