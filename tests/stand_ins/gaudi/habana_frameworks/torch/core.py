"""Stand-in for `habana_frameworks.torch.core`."""

import habana_frameworks.torch.hpu  # noqa: F401


def mark_step() -> None:
    """In lazy mode the real one runs what has accumulated; here nothing accumulates."""
