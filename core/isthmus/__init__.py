"""Isthmus serves large language models on any accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.contract import CONTRACT_VERSION
from isthmus.sampling_params import SamplingParams
from isthmus.version import __version__

if TYPE_CHECKING:
    from isthmus.llm import LLM

__all__ = ["CONTRACT_VERSION", "LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # LLM needs torch; ``import isthmus`` must not.
    if name == "LLM":
        from isthmus.llm import LLM

        return LLM
    raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
