"""``isthmus explain``."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from isthmus_server.cli.quantities import key_value, size_bytes, token_count

HELP: Final = """
Say what a model would get on a device, without loading its weights: memory, how many requests fit,
who computes what, and what it does without, and why.

[bold]Examples[/bold]

  isthmus explain HuggingFaceTB/SmolLM2-135M-Instruct --device cpu

  isthmus explain ./model --device cpu --request-tokens 2048 --json
"""


def explain(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file, or a hub name (owner/model).")],
    device: Annotated[str, typer.Option("--device", help="auto, or a backend's name.")] = "auto",
    request_tokens: Annotated[
        int | None,
        typer.Option(
            "--request-tokens",
            help="Length of the requests to count, prompt and output.  [dim]default: the longest[/dim]",
            parser=token_count,
            metavar="TOKENS",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="As for serve.", parser=token_count, metavar="TOKENS")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="As for serve.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype", help="As for serve.")] = "auto",
    kv_cache_memory: Annotated[
        int | None, typer.Option("--kv-cache-memory", help="As for serve.", parser=size_bytes, metavar="SIZE")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", help="As for serve.", min=0.01, max=1.0)
    ] = 0.9,
    block_size: Annotated[int | None, typer.Option("--block-size", help="As for serve.", min=1, max=1024)] = None,
    max_num_seqs: Annotated[int | None, typer.Option("--max-num-seqs", help="As for serve.", min=1)] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option("--max-num-batched-tokens", help="As for serve.", parser=token_count, metavar="TOKENS"),
    ] = None,
    backend_option: Annotated[
        list[str] | None, typer.Option("--backend-option", help="As for serve; repeat.", metavar="NAME=VALUE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
    from isthmus.explain import explain

    explanation = explain(
        EngineOptions(
            model=ModelOptions(model=model, dtype=dtype, max_model_len=max_model_len),
            cache=CacheOptions(
                block_size=block_size,
                memory_bytes=kv_cache_memory,
                memory_fraction=gpu_memory_utilization,
                kv_dtype=kv_cache_dtype,
            ),
            scheduler=SchedulerOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
            backend=BackendOptions(device=device, options=dict(map(key_value, backend_option or []))),
        ),
        request_tokens,
    )
    sys.stdout.write((explanation.to_json() if as_json else explanation.text()) + "\n")
    raise typer.Exit(1 if explanation.problem else 0)
