"""Options of every command that talks to a running server."""

from __future__ import annotations

from typing import Annotated, Final

import typer

DEFAULT_URL: Final = "http://127.0.0.1:8000"

_PANEL: Final = "Server"

UrlOption = Annotated[
    str, typer.Option("--url", help="Where the server is.", envvar="ISTHMUS_URL", rich_help_panel=_PANEL)
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key", help="The server's key, if it has one.", envvar="ISTHMUS_API_KEY", rich_help_panel=_PANEL
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A name of the model.  [dim]default: the first that is served[/dim]",
        rich_help_panel=_PANEL,
    ),
]
