"""What a backend's parts raise that the contract does not let them raise, as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.contract import Backend
from isthmus.errors import BackendError, IsthmusError
from isthmus.executor.out_of_memory import is_out_of_memory


@contextmanager
def blamed(backend: Backend, doing: str) -> Iterator[None]:
    """Errors of ours, and a refused allocation, pass; any other becomes a :class:`BackendError`."""
    try:
        yield
    except IsthmusError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise BackendError(
            f"backend {backend.name!r} failed while {doing}: {what}; "
            f"`isthmus certify --device {backend.name}` looks for what is wrong with it"
        ) from error
