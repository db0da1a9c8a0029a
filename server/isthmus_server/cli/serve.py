"""``isthmus serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus_server.cli.logs import LogLevel, start_logging
from isthmus_server.cli.quantities import key_value, share, size_bytes, token_count

if TYPE_CHECKING:
    from isthmus_server.settings import ServerSettings

HELP: Final = """
Serve a model over an HTTP API that OpenAI's clients speak.

[bold]Examples[/bold]

  isthmus serve HuggingFaceTB/SmolLM2-135M-Instruct

  isthmus serve ./model-folder --device cpu --max-model-len 4096

  isthmus serve ./model.gguf --port 9000 --served-model-name small

  isthmus serve ./model --host 0.0.0.0 --api-key-file keys.txt

Then: [bold]isthmus chat[/bold], or any OpenAI client with base_url http://127.0.0.1:8000/v1.
"""

_MODEL: Final = "Model"
_CACHE: Final = "KV cache and scheduling"
_DEVICE: Final = "Device"
_HTTP: Final = "HTTP"
_LIFE: Final = "Lifecycle and logs"
_SWITCHES: Final = "Switches"
"""Of their own, because two long names in a row would crowd out every other option of a panel."""


def _opt(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


def serve(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file, or a hub name (owner/model).")],
    revision: Annotated[
        str | None, _opt("--revision", metavar="NAME", panel=_MODEL, help="Branch, tag or commit on the hub.")
    ] = None,
    dtype: Annotated[
        str,
        _opt(
            "--dtype",
            metavar="NAME",
            panel=_MODEL,
            help="auto, float32, bfloat16 or float16; auto follows the checkpoint.",
        ),
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        _opt(
            "--max-model-len",
            panel=_MODEL,
            help="Tokens a request may have, prompt and output (4096, 32k, 32K).  [dim]default: the model's own[/dim]",
            parser=token_count,
            metavar="TOKENS",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        _opt(
            "--served-model-name", metavar="NAME", panel=_MODEL, help="Name that clients use; repeat for more than one."
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        _opt("--chat-template", metavar="PATH", panel=_MODEL, help="A jinja file that replaces the model's template."),
    ] = None,
    random_weights: Annotated[
        bool, _opt("--random-weights", panel=_MODEL, help="Do not read weights: for measuring alone.")
    ] = False,
    device: Annotated[
        str,
        _opt(
            "--device", metavar="NAME", panel=_DEVICE, help="auto, or a backend's name; `isthmus backends` lists them."
        ),
    ] = "auto",
    backend_option: Annotated[
        list[str] | None,
        _opt("--backend-option", panel=_DEVICE, help="A setting of the backend; repeat.", metavar="NAME=VALUE"),
    ] = None,
    enforce_eager: Annotated[
        bool, _opt("--enforce-eager", panel=_DEVICE, help="Capture no graphs: slower, for finding faults.")
    ] = False,
    gpu_memory_utilization: Annotated[
        float,
        _opt(
            "--gpu-memory-utilization",
            metavar="SHARE",
            panel=_DEVICE,
            help="Share of the device's memory that weights, workspace and KV cache may take.",
            parser=share,
        ),
    ] = 0.9,
    kv_cache_memory: Annotated[
        int | None,
        _opt(
            "--kv-cache-memory",
            panel=_CACHE,
            help="Size of the KV cache (4GiB, 512MB); wins over --gpu-memory-utilization.",
            parser=size_bytes,
            metavar="SIZE",
        ),
    ] = None,
    num_gpu_blocks_override: Annotated[
        int | None,
        _opt(
            "--num-gpu-blocks-override",
            metavar="N",
            panel=_CACHE,
            help="Blocks of the KV cache; wins over sizes.",
            min=2,
        ),
    ] = None,
    block_size: Annotated[
        int | None, _opt("--block-size", metavar="N", panel=_CACHE, help="Tokens a block holds.", min=1, max=1024)
    ] = None,
    kv_cache_dtype: Annotated[
        str, _opt("--kv-cache-dtype", metavar="NAME", panel=_CACHE, help="Number format of the cache.")
    ] = "auto",
    enable_prefix_caching: Annotated[
        bool,
        _opt(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            panel=_SWITCHES,
            help="Keep the blocks of finished requests for others that begin alike.  [dim]default: on[/dim]",
            show_default=False,
        ),
    ] = True,
    max_num_seqs: Annotated[
        int | None, _opt("--max-num-seqs", metavar="N", panel=_CACHE, help="Requests that run at a time.", min=1)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        _opt(
            "--max-num-batched-tokens",
            panel=_CACHE,
            help="Tokens computed in one step.",
            parser=token_count,
            metavar="TOKENS",
        ),
    ] = None,
    max_num_queued_reqs: Annotated[
        int,
        _opt(
            "--max-num-queued-reqs", metavar="N", panel=_CACHE, help="Requests that may wait; one more gets 503.", min=1
        ),
    ] = 4096,
    async_scheduling: Annotated[
        bool,
        _opt(
            "--async-scheduling/--no-async-scheduling",
            panel=_SWITCHES,
            help="Plan a step while the one before it runs.  [dim]default: on[/dim]",
            show_default=False,
        ),
    ] = True,
    host: Annotated[
        str, _opt("--host", metavar="ADDRESS", panel=_HTTP, help="Address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, _opt("--port", metavar="PORT", panel=_HTTP, help="0 takes a free one.", min=0, max=65535)
    ] = 8000,
    uds: Annotated[
        Path | None, _opt("--uds", metavar="PATH", panel=_HTTP, help="Listen on this Unix socket instead.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        _opt(
            "--api-key",
            metavar="KEY",
            panel=_HTTP,
            help="A key that clients must send; repeat for more.  Others on this machine can read a command "
            "line: prefer the file or the variable.",
            envvar="ISTHMUS_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, _opt("--api-key-file", metavar="PATH", panel=_HTTP, help="A file with one key a line.")
    ] = None,
    drain_grace_s: Annotated[
        float,
        _opt(
            "--drain-grace-s",
            metavar="SECONDS",
            panel=_LIFE,
            help="Seconds after SIGTERM with requests still taken.",
            min=0.0,
        ),
    ] = 0.0,
    shutdown_timeout_s: Annotated[
        float, _opt("--shutdown-timeout-s", metavar="SECONDS", panel=_LIFE, help="Seconds to finish.", min=0.0)
    ] = 30.0,
    stuck_after_s: Annotated[
        float,
        _opt(
            "--stuck-after-s",
            metavar="SECONDS",
            panel=_LIFE,
            help="Seconds without progress until /livez fails.",
            min=0.1,
        ),
    ] = 60.0,
    access_log: Annotated[
        bool,
        _opt("--access-log", panel=_LIFE, help="A line of JSON a request: counts and times, no text."),
    ] = False,
    log_level: Annotated[
        LogLevel,
        _opt(
            "--log-level",
            metavar="LEVEL",
            panel=_LIFE,
            help="debug, info, warning or error; debug also shows tracebacks.",
        ),
    ] = LogLevel.INFO,
) -> None:
    start_logging(log_level, "server")
    from isthmus.config import BackendOptions, CacheOptions, EngineOptions, ModelOptions, SchedulerOptions
    from isthmus_server.settings import ServerSettings

    engine = EngineOptions(
        model=ModelOptions(
            model=model, revision=revision, dtype=dtype, max_model_len=max_model_len, random_weights=random_weights
        ),
        cache=CacheOptions(
            block_size=block_size,
            num_blocks=num_gpu_blocks_override,
            memory_bytes=kv_cache_memory,
            memory_fraction=gpu_memory_utilization,
            kv_dtype=kv_cache_dtype,
            prefix_caching=enable_prefix_caching,
        ),
        scheduler=SchedulerOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_num_queued_reqs,
            overlap=async_scheduling,
        ),
        backend=BackendOptions(
            device=device, options=dict(map(key_value, backend_option or [])), graphs=not enforce_eager
        ),
    )
    settings = ServerSettings(
        engine=engine,
        served_names=tuple(served_model_name or ()),
        host=host,
        port=port,
        uds=uds,
        api_keys=_keys(api_key or [], api_key_file),
        chat_template=None if chat_template is None else _read(chat_template, "--chat-template"),
        drain_grace_s=drain_grace_s,
        shutdown_timeout_s=shutdown_timeout_s,
        stuck_after_s=stuck_after_s,
        log_level=str(log_level),
        access_log=access_log,
    )
    sys.exit(_run(settings))


def _run(settings: ServerSettings) -> int:
    from isthmus_server.process import run

    return run(settings)


def _keys(given: list[str], path: Path | None) -> tuple[str, ...]:
    from isthmus.errors import IsthmusError

    found = [key.strip() for key in given]
    if path is not None:
        found += [line.strip() for line in _read(path, "--api-key-file").splitlines() if line.strip()]
        if not found:
            raise IsthmusError(f"--api-key-file {path} holds no key; write one a line")
    if not all(found):
        raise IsthmusError("an API key is empty; give a long random text, or leave the option out")
    return tuple(dict.fromkeys(found))


def _read(path: Path, option: str) -> str:
    from isthmus.errors import IsthmusError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise IsthmusError(f"cannot read {option} {path}: {reason}") from error
