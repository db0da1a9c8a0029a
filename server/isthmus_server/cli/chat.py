"""``isthmus chat``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus_server.cli.client_options import DEFAULT_URL, KeyOption, ModelOption, UrlOption

if TYPE_CHECKING:
    from isthmus_server.cli.client import ApiClient

HELP: Final = """
Talk to a running server, in the terminal.

[bold]Examples[/bold]

  isthmus chat

  isthmus chat --system "Answer in one sentence."

  isthmus chat --once "What is an isthmus?"

Inside: [bold]/clear[/bold] forgets the conversation, [bold]/exit[/bold] or Ctrl-D ends, Ctrl-C stops an answer.
"""


def chat(
    once: Annotated[str | None, typer.Option("--once", help="Ask this, print the answer, end.", metavar="TEXT")] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before all else.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 always takes the likeliest token.", min=0.0)
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    model: ModelOption = None,
) -> None:
    from isthmus_server.cli.client import ApiClient

    client = ApiClient(url, api_key)
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    wanted: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    talk = _Conversation(client, {"model": model or client.first_model(), "stream": True, **wanted}, system)
    if once is not None:
        talk.ask(once)
        return
    _converse(talk)


class _Conversation:
    def __init__(self, client: ApiClient, options: dict[str, Any], system: str | None) -> None:
        self._client = client
        self._options = options
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)

    @property
    def model(self) -> str:
        return str(self._options["model"])

    def clear(self) -> None:
        self._messages = list(self._start)

    def ask(self, text: str) -> None:
        """Prints the answer as it comes; Ctrl-C keeps what came until then."""
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for event in self._client.events("/v1/chat/completions", {**self._options, "messages": self._messages}):
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    pieces.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            pass
        except Exception:
            self._messages.pop()
            raise
        sys.stdout.write("\n")
        self._messages.append({"role": "assistant", "content": "".join(pieces)})


def _converse(talk: _Conversation) -> None:
    from isthmus.errors import IsthmusError

    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its line editing)

        typer.echo(f"{talk.model}: /clear forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            talk.clear()
        elif line:
            try:
                talk.ask(line)
            except IsthmusError as error:
                typer.echo(f"isthmus: {error}", err=True)
