"""``isthmus backends``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from isthmus.contract import Capabilities, DeviceInfo
    from isthmus.plugins import BackendStatus

HELP: Final = """
List the installed backends: the devices each sees and what they can do, or why it cannot be used.

[bold]Examples[/bold]

  isthmus backends

  isthmus backends --json
"""


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every capability.")] = False,
) -> None:
    from isthmus.plugins import list_backends

    found = list_backends()
    if as_json:
        sys.stdout.write(json.dumps([asdict(status) for status in found], indent=2, default=str) + "\n")
        return
    from rich.console import Console

    Console().print(table(found))


def table(found: list[BackendStatus]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        "backend", "devices and what they can do", "from", box=None, padding=(0, 2, 1, 0), header_style="bold"
    )
    for status in found:
        name, origin = escape(status.name), f"[dim]{escape(status.distribution)}[/dim]"
        if status.reason:
            shown.add_row(f"[dim]{name}[/dim]", f"[yellow]{escape(status.reason)}[/yellow]", origin)
            continue
        lines = [escape(_device(device)) for device in status.devices]
        if status.capabilities is not None:
            lines.append(f"[dim]{escape(_abilities(status.capabilities))}[/dim]")
        shown.add_row(f"[green]{name}[/green]", "\n".join(lines), origin)
    return shown


def _device(device: DeviceInfo) -> str:
    memory = f", {device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else ""
    return f"{device.index}: {device.name}{memory}"


def _abilities(capabilities: Capabilities) -> str:
    parts = [", ".join(capabilities.dtypes)]
    parts.append(f"blocks of {', '.join(map(str, capabilities.block_sizes[:4]))}")
    parts.append(f"graphs: {capabilities.graph_scope}")
    parts.append(f"{capabilities.max_steps_in_flight} steps in flight")
    features = ("sliding_window", "logit_softcap", "experts", "logprobs", "prompt_logprobs")
    parts += [name.replace("_", " ") for name in features if getattr(capabilities, name)]
    return "; ".join(parts)
