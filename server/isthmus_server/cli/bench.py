"""``isthmus bench``."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus_server.cli.client_options import DEFAULT_URL, KeyOption, ModelOption, UrlOption
from isthmus_server.cli.logs import LogLevel, start_logging
from isthmus_server.cli.quantities import key_value, size_bytes, token_count

if TYPE_CHECKING:
    from isthmus.llm import LLM
    from isthmus_server.load.workload import Workload

app = typer.Typer(
    no_args_is_help=True,
    help="""
Measure a running server, or the engine by itself.

[bold]Examples[/bold]

  isthmus bench serve --concurrency 1,8,32 --num-requests 64

  isthmus bench throughput ./model --num-requests 256 --output-json result.json

  isthmus bench latency ./model --batch-size 8
""",
)

_WORK: Final = "Workload"
_ENGINE: Final = "Engine"

NumRequests = Annotated[int, typer.Option("--num-requests", min=1, help="Requests of a run.", rich_help_panel=_WORK)]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", "--input-len", min=1, rich_help_panel=_WORK)]
OutputTokens = Annotated[int, typer.Option("--output-tokens", "--output-len", min=1, rich_help_panel=_WORK)]
Spread = Annotated[
    float,
    typer.Option(
        "--spread", min=0.0, max=1.0, help="Lengths vary by this share of them, either way.", rich_help_panel=_WORK
    ),
]
SharedPrefix = Annotated[
    int, typer.Option("--shared-prefix", min=0, help="Tokens that all prompts begin with.", rich_help_panel=_WORK)
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed makes the same requests.", rich_help_panel=_WORK)]
OutputJson = Annotated[
    Path | None, typer.Option("--output-json", help="Write the result here too.", rich_help_panel=_WORK)
]
TracePath = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Then run once more, recorded as a Chrome trace of host and device (.json or .json.gz).",
        rich_help_panel=_WORK,
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="A model folder, a .gguf file, or a hub name.")]
Device = Annotated[str, typer.Option("--device", rich_help_panel=_ENGINE)]
Dtype = Annotated[str, typer.Option("--dtype", rich_help_panel=_ENGINE)]
BackendOption = Annotated[
    list[str] | None, typer.Option("--backend-option", metavar="NAME=VALUE", rich_help_panel=_ENGINE)
]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", parser=token_count, metavar="TOKENS", rich_help_panel=_ENGINE)
]
KvMemory = Annotated[
    int | None, typer.Option("--kv-cache-memory", parser=size_bytes, metavar="SIZE", rich_help_panel=_ENGINE)
]
KvDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", metavar="NAME", help="As for serve.", rich_help_panel=_ENGINE)
]
MaxNumSeqs = Annotated[int | None, typer.Option("--max-num-seqs", min=1, rich_help_panel=_ENGINE)]
RandomWeights = Annotated[bool, typer.Option("--random-weights", rich_help_panel=_ENGINE)]
Level = Annotated[LogLevel, typer.Option("--log-level", rich_help_panel=_ENGINE)]


@app.command(name="serve", help="Measure a running server over HTTP: throughput, time to first token, gaps.")
def bench_serve(
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Requests at a time; several runs: 1,8,32.", rich_help_panel=_WORK)
    ] = "8",
    num_requests: NumRequests = 64,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 128,
    spread: Spread = 0.0,
    shared_prefix: SharedPrefix = 0,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Requests before each run.", rich_help_panel=_WORK)
    ] = 2,
    seed: Seed = 0,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=16, help="For servers that do not say theirs.", rich_help_panel=_WORK),
    ] = None,
    output_json: OutputJson = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    model: ModelOption = None,
) -> None:
    from isthmus_server.cli.client import ApiClient
    from isthmus_server.load.workload import Workload

    card = ApiClient(url, api_key).model_card(model)
    results = []
    for run, level in enumerate(_levels(concurrency)):
        workload = Workload(
            num_requests=num_requests + warmup,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vocab_size=vocab_size or card.get("vocab_size") or 8192,
            # Another seed each run, or its prompts would be in the prefix cache.
            seed=seed + run,
            spread=spread,
            shared_prefix_tokens=shared_prefix,
        )
        figures = _drive(url, api_key, str(card["id"]), workload, level, warmup)
        results.append({"concurrency": level, "workload": asdict(workload), **figures})
        typer.echo(_line(results[-1]), err=True)
    _write({"benchmark": "serve", "url": url, "model": card["id"], **_where(), "runs": results}, output_json)


def _drive(
    url: str, api_key: str | None, model: str, workload: Workload, concurrency: int, warmup: int
) -> dict[str, Any]:
    import asyncio

    import uvloop

    from isthmus_server.load.client import Target, drive
    from isthmus_server.load.report import summarize
    from isthmus_server.load.workload import make_requests

    requests = make_requests(workload)
    target = Target(url, api_key)

    async def both() -> dict[str, Any]:
        if warmup:
            await drive(target, model, requests[-warmup:], min(concurrency, warmup))
        seen, wall_s = await drive(target, model, requests[: len(requests) - warmup], concurrency)
        return summarize(seen, wall_s)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(both())


@app.command(help="Measure the engine in this process with all requests at once.")
def throughput(
    model: ModelArgument,
    num_requests: NumRequests = 64,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 128,
    spread: Spread = 0.0,
    shared_prefix: SharedPrefix = 0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend_option: BackendOption = None,
    max_model_len: MaxModelLen = None,
    kv_cache_memory: KvMemory = None,
    kv_cache_dtype: KvDtype = "auto",
    max_num_seqs: MaxNumSeqs = None,
    random_weights: RandomWeights = False,
    log_level: Level = LogLevel.WARNING,
    output_json: OutputJson = None,
    trace: TracePath = None,
) -> None:
    from isthmus_server.load.offline import measure_throughput
    from isthmus_server.load.workload import Workload, make_requests

    start_logging(log_level, "bench")
    engine = _engine(
        model,
        device=device,
        dtype=dtype,
        device_options=dict(map(key_value, backend_option or [])),
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=max_num_seqs,
        random_weights=random_weights,
    )
    with engine as llm:
        workload = Workload(
            num_requests=num_requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vocab_size=llm.ready.vocab_size,
            seed=seed,
            spread=spread,
            shared_prefix_tokens=shared_prefix,
        )
        measure_throughput(llm, make_requests(_warming(workload, 2)))
        figures = measure_throughput(llm, make_requests(workload))
        result = {"benchmark": "throughput", "model": model, **_where(), **_settled(llm), "workload": asdict(workload)}
        figures |= _traced(llm, trace, workload)
    _write({**result, **figures}, output_json)


@app.command(help="Measure the engine in this process, one batch after the other.")
def latency(
    model: ModelArgument,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, rich_help_panel=_WORK)] = 1,
    num_batches: Annotated[int, typer.Option("--num-batches", min=1, rich_help_panel=_WORK)] = 10,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 128,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend_option: BackendOption = None,
    max_model_len: MaxModelLen = None,
    kv_cache_memory: KvMemory = None,
    kv_cache_dtype: KvDtype = "auto",
    max_num_seqs: MaxNumSeqs = None,
    random_weights: RandomWeights = False,
    log_level: Level = LogLevel.WARNING,
    output_json: OutputJson = None,
    trace: TracePath = None,
) -> None:
    from isthmus_server.load.offline import measure_latency
    from isthmus_server.load.workload import Workload, make_requests

    start_logging(log_level, "bench")
    engine = _engine(
        model,
        device=device,
        dtype=dtype,
        device_options=dict(map(key_value, backend_option or [])),
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=max_num_seqs,
        random_weights=random_weights,
    )
    with engine as llm:
        workload = Workload(
            num_requests=num_batches * batch_size,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vocab_size=llm.ready.vocab_size,
            seed=seed,
        )
        measure_latency(llm, make_requests(_warming(workload, 2 * batch_size)), batch_size)
        figures = measure_latency(llm, make_requests(workload), batch_size)
        result = {"benchmark": "latency", "model": model, **_where(), **_settled(llm), "workload": asdict(workload)}
        figures |= _traced(llm, trace, replace(workload, num_requests=batch_size))
    _write({**result, **figures}, output_json)


def _engine(model: str, **options: Any) -> LLM:
    from isthmus.llm import LLM

    return LLM(model, skip_tokenizer_init=True, **options)


def _traced(llm: LLM, path: Path | None, workload: Workload) -> dict[str, Any]:
    """Figures of one more run, recorded.  What was measured before is not slowed by the recording."""
    if path is None:
        return {}
    from isthmus.trace import tracing
    from isthmus_server.load.offline import measure_throughput
    from isthmus_server.load.workload import make_requests

    # Other tokens than before, so that no prompt is in the prefix cache.
    requests = make_requests(replace(workload, seed=workload.seed + 2_000_003))
    with tracing(llm, path) as trace:
        measure_throughput(llm, requests)
    typer.echo(trace.text(), err=True)
    return {"trace": trace.figures()}


def _warming(workload: Workload, num_requests: int) -> Workload:
    """A few requests of the same kind and other tokens, so that nothing measured is in the prefix cache."""
    return replace(workload, num_requests=num_requests, seed=workload.seed + 1_000_003)


def _levels(text: str) -> list[int]:
    from isthmus.errors import IsthmusError

    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1 or max(levels) > 10_000:
        raise IsthmusError(f"--concurrency {text!r} must be numbers from 1 to 10000, separated by commas")
    return levels


def _where() -> dict[str, Any]:
    import os

    from isthmus.version import __version__

    return {"version": __version__, "machine": platform.machine(), "cpu_cores": os.cpu_count()}


def _settled(llm: LLM) -> dict[str, Any]:
    ready = llm.ready
    return {"device": ready.device_name, "backend": ready.backend, "dtype": ready.dtype, "providers": ready.providers}


def _line(result: dict[str, Any]) -> str:
    ttft, itl = result["ttft_ms"], result["itl_ms"]
    errors = f", errors: {result['errors']}" if result["errors"] else ""
    return (
        f"concurrency {result['concurrency']}: {result['output_token_per_s']:.0f} output tok/s, "
        f"TTFT p50 {ttft['p50']:.1f} p99 {ttft['p99']:.1f} ms, ITL p50 {itl['p50']:.2f} p99 {itl['p99']:.2f} ms{errors}"
    )


def _write(result: dict[str, Any], path: Path | None) -> None:
    from isthmus.errors import IsthmusError

    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if path is not None:
        try:
            path.write_text(text)
        except OSError as error:
            raise IsthmusError(f"cannot write --output-json {path}: {error.strerror}") from error
