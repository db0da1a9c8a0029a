"""What a model gets less of than it, or the user, might expect, and why."""

from __future__ import annotations

from isthmus.config import EngineOptions
from isthmus.contract import Capabilities, GraphScope
from isthmus.model.spec import ModelSpec
from isthmus.refusals import refusals


def downgrades(
    options: EngineOptions, capabilities: Capabilities, spec: ModelSpec, *, dtype: str, kv_dtype: str, packed: bool
) -> list[str]:
    """One line each.  ``packed`` says that the file's weights are in a block format (GGUF)."""
    notes: list[str] = []
    if options.model.dtype == "auto" and dtype != spec.dtype:
        declared = ", ".join(capabilities.dtypes)
        notes.append(f"computes in {dtype}, not in the checkpoint's {spec.dtype}: the backend declares {declared}")
    if packed:
        notes.append(f"block-quantised weights are kept as {dtype}: no backend part takes their format")
    if kv_dtype != dtype and options.cache.kv_dtype == "auto":
        declared = ", ".join(capabilities.kv_dtypes)
        notes.append(f"keys and values are {kv_dtype}, not {dtype}: the backend declares {declared}")
    notes += _step_notes(options, capabilities)
    return notes + refusals(capabilities)


def _step_notes(options: EngineOptions, capabilities: Capabilities) -> list[str]:
    notes: list[str] = []
    scope = capabilities.graph_scope
    if scope is GraphScope.NONE:
        notes.append("every step runs eagerly: the backend declares no graph capture")
    elif not options.backend.graphs:
        notes.append("every step runs eagerly: graphs are switched off")
    elif scope is GraphScope.FORWARD:
        outside = "inputs and sampling run" if capabilities.graph_any_size else "sampling runs"
        notes.append(f"{outside} outside the graph: the backend captures the forward alone")
    if capabilities.max_steps_in_flight == 1:
        notes.append("the device waits while a step is planned: the backend takes one step at a time")
    elif not options.scheduler.overlap:
        notes.append("the device waits while a step is planned: overlap is switched off")
    return notes
