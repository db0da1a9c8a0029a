"""What the log says, and what it must never say."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

CANARY = "CANARY-7f3a"


def test_the_access_log_counts_and_keeps_quiet(start_server: Any) -> None:
    server = start_server("--access-log", "--api-key", f"key-{CANARY}")
    headers = {"Authorization": f"Bearer key-{CANARY}"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        body = {"prompt": f"{CANARY} in a prompt", "max_tokens": 5, "ignore_eos": True, "stop": [CANARY]}
        for stream in (False, True):
            client.post("/v1/completions", json={**body, "stream": stream}, headers={"X-Request-Id": "mine"})
        refused = client.post("/v1/completions", json={"prompt": "x", "temperature": CANARY, "user": CANARY})
        assert CANARY not in refused.text
        client.post("/v1/completions", content=f'{{"prompt": "{CANARY}'.encode())
        for path in ("/livez", "/version", "/metrics", f"/{CANARY}"):
            answer = client.get(path)
            assert path == f"/{CANARY}" or CANARY not in answer.text
        client.get("/v1/models", headers={"Authorization": f"Bearer wrong-{CANARY}"})
    server.terminate()
    assert server.wait() == 0
    text = server.text()
    assert CANARY not in text
    lines = [json.loads(line) for line in re.findall(r"access_log: (\{.*\})$", text, re.MULTILINE)]
    assert [line["status"] for line in lines] == [200, 200, 400, 400, 200, 200, 404, 401]
    for line in lines[:2]:
        assert line["request_id"] == "mine" and line["path"] == "/v1/completions"
        assert line["output_tokens"] == 5 and line["prompt_tokens"] == len(body["prompt"])
        assert line["finish_reasons"] == ["length"] and line["choices"] == 1
        assert 0 <= line["queued_ms"] <= line["ttft_ms"] <= line["ms"]
        assert re.fullmatch("[0-9a-f]{8}", line["key"])
    assert lines[-1]["key"] is None


def test_no_line_for_requests_unless_asked(start_server: Any) -> None:
    server = start_server()
    with httpx.Client(base_url=server.url) as client:
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        client.get("/nothing")
    assert len(server.text().splitlines()) == 3, server.text()
