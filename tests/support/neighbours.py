"""Tests that stand on another file's bench.  On the path of the tests, whose folders are no packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def neighbour(file: str, name: str) -> ModuleType:
    """Module ``name`` of the folder that ``file`` is in, loaded anew."""
    spec = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
