"""Stand-in for `habana_frameworks.torch.utils.internal`."""

import os


def is_lazy() -> bool:
    """PT_HPU_LAZY_MODE=1; unset, it is 0 from Gaudi software 1.21 on."""
    return os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"
