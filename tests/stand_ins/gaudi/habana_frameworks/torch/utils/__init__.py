"""Stand-in for `habana_frameworks.torch.utils`."""

from habana_frameworks.torch.utils import internal

__all__ = ["internal"]
