"""Who may call what.  Default deny: with keys set, every path that is not listed here needs one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from starlette.types import Scope

from isthmus_server.api_error import ApiError

PUBLIC_PATHS: Final = frozenset({"/health", "/livez", "/readyz", "/ping"})
"""Probes: they say whether the server lives and nothing else."""

_SALT_DOMAIN = b"isthmus cache salt\x00"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Keys:
    """The API keys, kept as SHA-256 digests."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def check(self, scope: Scope) -> bytes:
        """The digest of the key that came with ``scope``, or ``b""`` where none is needed.

        Decides on ``scope["path"]``, never on a URL put together from the Host header.  Raises
        :class:`ApiError` with 401.  Takes the same time whichever key matches.
        """
        if not self._digests:
            return b""
        given = _bearer(scope)
        digest = _digest(given)
        matched = False
        for known in self._digests:
            matched |= hmac.compare_digest(digest, known)
        if matched and given:
            return digest
        if scope["path"] in PUBLIC_PATHS:
            return b""
        message = "no API key was given; send it as 'Authorization: Bearer KEY'"
        if given:
            message = "the API key is not one of this server's"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def cache_salt(key_digest: bytes, wanted: str | None) -> bytes:
    """The salt of a request's prefix blocks: callers with different keys never share any.

    ``key_digest`` is empty for a server without keys; ``wanted`` is the request's own ``cache_salt``.
    """
    if not key_digest and wanted is None:
        return b""
    own = b"" if wanted is None else b"\x01" + wanted.encode("utf-8", "surrogatepass")
    return hashlib.sha256(_SALT_DOMAIN + len(key_digest).to_bytes(1, "big") + key_digest + own).digest()


def _bearer(scope: Scope) -> bytes:
    for name, value in scope.get("headers", ()):
        if name == b"authorization":
            scheme, _, key = bytes(value).partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return b""
