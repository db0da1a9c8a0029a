"""A thousand clients that go away at random moments leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

NUM_CLIENTS = 1000
AT_ONCE = 100


def gauge(metrics: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", metrics, re.MULTILINE)
    assert found is not None, f"{name} is not in /metrics"
    return float(found[1])


async def drop(host: str, port: int, draw: random.Random) -> None:
    body = {
        "prompt": [draw.randrange(32, 120) for _ in range(draw.randint(1, 400))],
        "max_tokens": draw.randint(1, 400),
        "stream": draw.random() < 0.8,
        "n": draw.choice((1, 1, 1, 3)),
        "ignore_eos": True,
    }
    encoded = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(encoded)}"
    )
    reader, writer = await asyncio.open_connection(host, port)
    whole = head.encode() + b"\r\n\r\n" + encoded
    moment = draw.random()
    try:
        if moment < 0.1:  # in the middle of the request
            writer.write(whole[: draw.randint(1, len(whole) - 1)])
            await writer.drain()
        elif moment < 0.4:  # at once
            writer.write(whole)
            await writer.drain()
        else:  # after so many bytes of the answer, maybe all
            writer.write(whole)
            await writer.drain()
            async with asyncio.timeout(draw.random() * 0.5):
                await reader.readexactly(draw.randint(1, 40_000))
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        if draw.random() < 0.5:
            writer.transport.abort()  # a reset
        else:
            writer.close()  # an end


def test_disconnects_at_random_moments(start_server: Any) -> None:
    server = start_server("--backend-option", "step_s=0.005", "--no-enable-prefix-caching", "--max-num-seqs", "64")
    address = urlsplit(server.url)

    async def storm() -> None:
        draw = random.Random(1)
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(seed: int) -> None:
            async with gate:
                await drop(str(address.hostname), int(address.port or 0), random.Random(seed))

        await asyncio.gather(*(one(draw.randrange(2**32)) for _ in range(NUM_CLIENTS)))

    with httpx.Client(base_url=server.url, timeout=10) as client:
        before = client.get("/metrics").text
        asyncio.run(storm())
        deadline = time.monotonic() + 5
        while True:
            after = client.get("/metrics").text
            quiet = all(
                gauge(after, name) == 0
                for name in (
                    "vllm:num_requests_running",
                    "vllm:num_requests_waiting",
                    "isthmus:http_requests_in_flight",
                )
            )
            level = gauge(after, "isthmus:kv_free_blocks") == gauge(before, "isthmus:kv_free_blocks") > 0
            if quiet and level:
                break
            assert time.monotonic() < deadline, after
            time.sleep(0.05)
        aborted = re.search(r'isthmus:requests_aborted_total{[^}]*cause="disconnect"[^}]*} (\S+)', after)
        assert aborted is not None and float(aborted[1]) > NUM_CLIENTS / 4
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4}).status_code == 200
    assert "ERROR" not in server.text() and "Traceback" not in server.text(), server.text()[-2000:]
    server.terminate()
    assert server.wait() == 0
