"""``isthmus complete``."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from isthmus_server.cli.client_options import DEFAULT_URL, KeyOption, ModelOption, UrlOption

HELP: Final = """
Let the model of a running server continue a text.

[bold]Examples[/bold]

  isthmus complete "The capital of France is"

  isthmus complete --max-tokens 200 --temperature 0 < beginning.txt
"""


def complete(
    prompt: Annotated[str | None, typer.Argument(help="The text; standard input if it is left out.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest continuation.", min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 always takes the likeliest token.", min=0.0)
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeat for more.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt too.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    model: ModelOption = None,
) -> None:
    from isthmus.errors import IsthmusError
    from isthmus_server.cli.client import ApiClient

    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise IsthmusError("the prompt is empty; give a text, as an argument or on standard input")
    client = ApiClient(url, api_key)
    options = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or None, "echo": echo or None}
    body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    body |= {"model": model or client.first_model(), "prompt": text, "max_tokens": max_tokens, "stream": True}
    try:
        for event in client.events("/v1/completions", body):
            for choice in event["choices"]:
                sys.stdout.write(choice["text"])
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
