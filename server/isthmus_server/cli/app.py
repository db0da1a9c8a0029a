"""The command and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus_server.cli import backends, bench, certify, chat, complete, explain, serve

app = typer.Typer(
    name="isthmus",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
Serve large language models on any accelerator.

Start a server, then talk to it from another terminal:

  [bold]isthmus serve[/bold] HuggingFaceTB/SmolLM2-135M-Instruct

  [bold]isthmus chat[/bold]

What can this machine use?  [bold]isthmus backends[/bold] says, and what is missing for the rest.
""",
)


def _version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(help="Print the version.")
def version() -> None:
    from isthmus.version import __version__

    typer.echo(__version__)


app.command(name="serve", help=serve.HELP)(serve.serve)
app.command(name="chat", help=chat.HELP)(chat.chat)
app.command(name="complete", help=complete.HELP)(complete.complete)
app.add_typer(bench.app, name="bench")
app.command(name="backends", help=backends.HELP)(backends.backends)
app.command(name="explain", help=explain.HELP)(explain.explain)
app.command(name="certify", help=certify.HELP)(certify.certify)
