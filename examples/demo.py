"""Start a server, ask it one question over HTTP, print the answer as it streams, stop the server."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

QUESTION = "What is an isthmus? Answer in one short paragraph."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--question", default=QUESTION)
    args = parser.parse_args()

    url = f"http://{args.host}:{args.port}"
    isthmus = str(Path(sys.executable).parent / "isthmus")
    command = [isthmus, "serve", args.model, "--host", args.host, "--port", str(args.port)]
    say(f"Starting: {' '.join(['isthmus', *command[1:]])}")
    started = time.monotonic()
    with subprocess.Popen(command) as server:
        try:
            wait_until_ready(server, url)
            say(f"Ready after {time.monotonic() - started:.1f} s. Asking: {args.question}")
            ask(url, args.question)
        finally:
            say("Stopping the server")
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=60)
    say(f"The server ended with exit code {code}")
    return code


def wait_until_ready(server: subprocess.Popen[bytes], url: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"The server ended with exit code {server.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/readyz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"The server was not ready after {timeout_s:.0f} s")


def ask(url: str, question: str) -> None:
    body = {
        "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    first: float | None = None
    usage: dict[str, int] = {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        if response.status_code != httpx.codes.OK:
            raise SystemExit(f"The server answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.monotonic()
                    print(text, end="", flush=True)
    print()
    ended = time.monotonic()
    tokens = usage.get("completion_tokens", 0)
    if first is None or tokens < 2:
        raise SystemExit("The model answered nothing")
    rate = (tokens - 1) / (ended - first)
    say(f"{tokens} tokens, the first after {1000 * (first - started):.0f} ms, then {rate:.0f} tokens/s")


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
