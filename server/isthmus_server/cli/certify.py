"""``isthmus certify``."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from isthmus_server.cli.quantities import key_value

HELP: Final = """
Run the certification kit on a backend: is it what it says it is?

[bold]Examples[/bold]

  isthmus certify --device cpu

  isthmus certify --device cpu --backend-option kernels=off

  isthmus certify --device cpu -k attention
"""


def certify(
    device: Annotated[str, typer.Option("--device", help="A backend's name; `isthmus backends` lists them.")],
    backend_option: Annotated[
        list[str] | None,
        typer.Option("--backend-option", help="A setting of the backend; repeat.", metavar="NAME=VALUE"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="For a backend that loads models by itself; default: a tiny random one."),
    ] = None,
    select: Annotated[
        str | None, typer.Option("-k", help="Only tests that this pytest expression selects; certifies nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    from isthmus.testing.certify import certify, part_of

    shown: list[str] = []

    def progress(test: str, outcome: str) -> None:
        if part_of(test) not in shown:
            shown.append(part_of(test))
            sys.stderr.write(f"{'' if len(shown) == 1 else chr(10)}{shown[-1]:<14}")
        sys.stderr.write({"passed": ".", "skipped": "-"}.get(outcome, "F"))
        sys.stderr.flush()

    report = certify(device, dict(map(key_value, backend_option or [])), model=model, select=select, progress=progress)
    sys.stderr.write("\n\n" if shown else "")
    sys.stdout.write((report.to_json() if as_json else report.text()) + "\n")
    sound = report.certified or not (report.whole or report.failures or report.died or report.refused)
    raise typer.Exit(0 if sound else 1)
