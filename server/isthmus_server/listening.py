"""The socket, taken before anything is loaded: a port in use is told in the first instant."""

from __future__ import annotations

import errno
import ipaddress
import socket
import stat
from pathlib import Path

from isthmus.errors import IsthmusError


def listen(host: str, port: int, uds: Path | None) -> socket.socket:
    """A bound socket.  Raises :class:`IsthmusError` in one line that says what to do."""
    return _listen_unix(uds) if uds is not None else _listen_tcp(host, port)


def address(sock: socket.socket) -> str:
    """Where a client finds it."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def is_reachable(sock: socket.socket) -> bool:
    """Whether other machines may get here."""
    if sock.family == socket.AF_UNIX:
        return False
    return not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise IsthmusError(f"cannot listen on host {host!r}: {error.strerror}; give --host an address") from error
    family, kind, protocol, _, name = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
        sock.listen(1)  # a second listener on the same address fails here or above
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise IsthmusError(
                f"port {port} on {host} is in use; stop the other server or give another --port (0 takes a free one)"
            ) from error
        raise IsthmusError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def _listen_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        sock.close()
        raise IsthmusError(f"cannot listen on --uds {path}: {error.strerror or error}") from error
    except IsthmusError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _remove_stale(path: Path) -> None:
    """Removes a socket that nobody listens on any more."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise IsthmusError(f"--uds {path} exists and is no socket; give another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise IsthmusError(f"--uds {path} is in use; stop the other server or give another path")
