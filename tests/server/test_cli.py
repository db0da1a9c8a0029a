"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from isthmus.contract import Capabilities, DeviceInfo
from isthmus.plugins import BackendStatus
from isthmus_server.cli.backends import table
from isthmus_server.cli.quantities import key_value, share, size_bytes, token_count
from isthmus_server.load.report import percentile, spread
from isthmus_server.load.workload import Workload, make_requests


def isthmus(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus_server", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        input=stdin,
        env={**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **env},
    )


COMMANDS = (
    *((), ("serve",), ("chat",), ("complete",), ("backends",), ("version",)),
    *(("bench",), ("bench", "serve"), ("bench", "throughput"), ("bench", "latency")),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_quick_and_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys, isthmus_server.cli as cli\n"
        f"try: cli.app({[*command, '--help']!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'numpy', 'tokenizers', 'httpx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("command", [("serve",), ("chat",), ("complete",), ("backends",), ("bench",)], ids=" ".join)
def test_help_teaches_by_example(command: tuple[str, ...]) -> None:
    assert f"isthmus {command[0]}" in isthmus(*command, "--help").stdout.partition("Examples")[2]


def test_serve_takes_the_names_that_users_know() -> None:
    shown = isthmus("serve", "--help", COLUMNS="200").stdout
    for name in (
        *("--device", "--dtype", "--max-model-len", "--block-size", "--max-num-seqs", "--max-num-batched-tokens"),
        *("--gpu-memory-utilization", "--kv-cache-memory", "--num-gpu-blocks-override", "--enforce-eager", "--host"),
        *("--enable-prefix-caching", "--no-enable-prefix-caching", "--port", "--served-model-name", "--api-key"),
        *("--uds", "--chat-template", "--max-num-queued-reqs", "--no-async-scheduling", "--backend-option"),
        *("--api-key-file", "--log-level", "--drain-grace-s", "--shutdown-timeout-s", "--stuck-after-s"),
    ):
        assert name in shown, name


def test_version() -> None:
    from isthmus.version import __version__

    assert isthmus("version").stdout.strip() == isthmus("--version").stdout.strip() == __version__


def test_backends() -> None:
    found = json.loads(isthmus("backends", "--json").stdout)
    by_name = {status["name"]: status for status in found}
    assert by_name["null"]["devices"] and not by_name["null"]["reason"]
    assert all(bool(status["devices"]) != bool(status["reason"]) for status in found)


def test_the_table_of_backends_shows_devices_and_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    device = DeviceInfo(backend="a", index=0, name="a [fast] device", memory_bytes=2**35)
    found = [
        BackendStatus(name="a", distribution="x 1", devices=(device,), capabilities=Capabilities(experts=True)),
        BackendStatus(name="b", distribution="y 2", reason="no SDK; pip install 'y[b]'"),
    ]
    Console(width=200).print(table(found))
    shown = capsys.readouterr().out
    assert "0: a [fast] device, 32 GiB" in shown and "experts" in shown and "no SDK; pip install 'y[b]'" in shown


def test_chat_once(server: Any) -> None:
    done = isthmus("chat", "--url", server.url, "--once", "hello", "--max-tokens", "9", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert 0 < len(done.stdout.rstrip("\n")) <= 9 and done.stdout.endswith("\n")
    again = isthmus("chat", "--once", "hello", "--max-tokens", "9", "--temperature", "0", ISTHMUS_URL=server.url)
    assert again.stdout == done.stdout


def test_chat_keeps_the_conversation_until_it_is_cleared(server: Any) -> None:
    lines = "hello\nhello\n/clear\nhello\n/exit\n"
    done = isthmus("chat", "--url", server.url, "--max-tokens", "9", "--temperature", "0", stdin=lines)
    first, second, third = done.stdout.splitlines()
    assert first == third != second


def test_complete(server: Any) -> None:
    arguments = ("--url", server.url, "--max-tokens", "7", "--temperature", "0")
    done = isthmus("complete", "once", *arguments)
    assert done.returncode == 0, done.stderr
    assert 0 < len(done.stdout.rstrip("\n")) <= 7
    assert isthmus("complete", *arguments, stdin="once").stdout == done.stdout
    assert isthmus("complete", "once", "--echo", *arguments).stdout == "once" + done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("chat", "--once", "x", "--url", "http://127.0.0.1:9"), "isthmus serve"),
        (("complete", "x", "--url", "ftp://x"), "http://host:port"),
        (("bench", "serve", "--url", "http://127.0.0.1:9"), "isthmus serve"),
        (("bench", "throughput", "{model}", "--device", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(toy_model: Path, arguments: tuple[str, ...], word: str) -> None:
    done = isthmus(*(argument.replace("{model}", str(toy_model)) for argument in arguments))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("isthmus: ") and word in line


def test_server_errors_reach_the_user(server: Any) -> None:
    done = isthmus("complete", "x", "--url", server.url, "--model", "another")
    assert done.returncode == 1 and "'another' does not exist" in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = isthmus("serve", "/no/such/model", "--port", "0", "--log-level", "debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_bench_serve(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = isthmus(
        *("bench", "serve", "--url", server.url, "--concurrency", "2,8", "--num-requests", "16"),
        *("--prompt-tokens", "20", "--output-tokens", "25", "--output-json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result == json.loads(done.stdout)
    assert [run["concurrency"] for run in result["runs"]] == [2, 8]
    for run in result["runs"]:
        assert run["completed"] == run["requests"] == 16 and not run["errors"]
        assert run["output_tokens"] == 16 * 25
        assert run["output_token_per_s"] == pytest.approx(16 * 25 / run["wall_s"], rel=0.01)
        assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"] <= run["e2e_ms"]["max"]


def test_bench_serve_counts_errors(server: Any) -> None:
    done = isthmus("bench", "serve", "--url", server.url, "--num-requests", "3", "--vocab-size", "100000")
    (run,) = json.loads(done.stdout)["runs"]
    assert run["completed"] == 0 and run["errors"] == {"HTTP 400": 3}


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench_offline(toy_model: Path, kind: str) -> None:
    size = ("--num-requests", "6") if kind == "throughput" else ("--num-batches", "3", "--batch-size", "2")
    done = isthmus("bench", kind, str(toy_model), "--device", "null", "--output-tokens", "10", *size)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == kind and result["backend"] == "null"
    if kind == "throughput":
        assert result["output_tokens"] == 60 and result["output_token_per_s"] > 0
    else:
        assert result["batches"] == 3 and result["batch_ms"]["p50"] > 0


def test_a_seed_makes_the_same_requests() -> None:
    workload = Workload(num_requests=5, prompt_tokens=50, output_tokens=10, vocab_size=259, spread=0.5, seed=3)
    first = make_requests(workload)
    assert first == make_requests(workload)
    assert len({len(request.prompt) for request in first}) > 1
    assert all(25 <= len(request.prompt) <= 75 for request in first)
    assert max(max(request.prompt) for request in first) < 259


def test_percentiles() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([], 0.5) == 0
    assert spread([0.002, 0.001]) == {"mean": 1.5, "p50": 1.0, "p90": 2.0, "p99": 2.0, "max": 2.0}


def test_quantities() -> None:
    for text, size in (
        ("4GiB", 4 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5g", 1_500_000_000),
        ("77", 77),
        ("1 KiB", 1024),
    ):
        assert size_bytes(text) == size
    for text, count in (("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500)):
        assert token_count(text) == count
    for text in ("", "x", "-1", "0", "4 parsecs", "1e9", "9" * 20):
        with pytest.raises(typer.BadParameter):
            size_bytes(text)
        with pytest.raises(typer.BadParameter):
            token_count(text)
    assert share("0.9") == 0.9 and share("1") == 1
    for text in ("0", "1.01", "-1", "nan", "x"):
        with pytest.raises(typer.BadParameter):
            share(text)
    assert key_value("a=b=c") == ("a", "b=c")
    with pytest.raises(typer.BadParameter):
        key_value("a")


def test_imports_bring_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, isthmus_server\n"
        "for found in pkgutil.walk_packages(isthmus_server.__path__, 'isthmus_server.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "bad = {'torch', 'transformers', 'triton', 'pickle5', 'dill'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 15
