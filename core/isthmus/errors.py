"""Every error that Isthmus raises on purpose.

IsthmusError
├── InvalidRequest      a caller's request cannot be served as written (HTTP 400)
├── QueueFull           the engine has no room to wait in; try again later (HTTP 503)
├── ModelError          a model folder, config, tokenizer or weight file is not usable
│   └── UnsupportedModel    the architecture or a feature of it is not known here
├── BackendError        something about a backend plugin or its device
│   ├── BackendNotFound     no plugin of that name is installed
│   ├── BackendUnavailable  the plugin is there but its SDK or device is not
│   ├── ContractMismatch    the plugin was written for another contract version
│   └── Unsupported         the backend does not declare the feature that was asked for
├── OutOfMemory         a budget does not hold what was asked of it
└── EngineDead          the engine process ended or stopped answering

A message says what happened, what was seen and what to do.  ``assert`` is kept for our own bugs.
"""


class IsthmusError(Exception):
    """Base of all deliberate errors."""


class InvalidRequest(IsthmusError):
    """A request that cannot be served as written.

    ``param`` names the offending field, for the error body of the HTTP API.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFull(IsthmusError):
    """No room to wait; ``retry_after_s`` is a hint for the client."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(IsthmusError):
    """A model folder, config, tokenizer or weight file is not usable."""


class UnsupportedModel(ModelError):
    """The architecture, or a feature its config asks for, is not known here."""


class BackendError(IsthmusError):
    """Something about a backend plugin or its device."""


class BackendNotFound(BackendError):
    """No plugin of that name is installed."""


class BackendUnavailable(BackendError):
    """The plugin is installed, but its SDK or its device is not."""


class ContractMismatch(BackendError):
    """The plugin was written for another major version of the contract."""


class Unsupported(BackendError):
    """The backend does not declare the feature that was asked for."""


class OutOfMemory(IsthmusError):
    """A memory budget does not hold what was asked of it."""


class EngineDead(IsthmusError):
    """The engine process ended, or stopped answering."""
