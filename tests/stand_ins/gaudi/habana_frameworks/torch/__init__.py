"""Stand-in for `habana_frameworks.torch`: importing it makes `torch.device("hpu")` and `hpu_backend` available."""

from habana_frameworks.torch import core, hpu, utils

__all__ = ["core", "hpu", "utils"]
