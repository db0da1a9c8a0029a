"""A small HTTP client for the commands that talk to a running server."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from isthmus.errors import IsthmusError

TIMEOUT_S: Final = 600.0


class ApiClient:
    """Raises :class:`IsthmusError`, with the server's own message, for whatever is not an answer."""

    def __init__(self, url: str, api_key: str | None) -> None:
        found = urlsplit(url if "://" in url else f"http://{url}")
        if found.scheme not in ("http", "https") or not found.hostname:
            raise IsthmusError(f"{url!r} is no address of a server; write http://host:port")
        self._url = url
        self._secure = found.scheme == "https"
        self._host = found.hostname
        self._port = found.port
        self._prefix = found.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        return str(self.model_card(None)["id"])

    def model_card(self, name: str | None) -> dict[str, Any]:
        """What the server says of a model, by default of its first."""
        answer = self._request("GET", "/v1/models", None)
        try:
            cards = json.loads(answer.read())["data"]
            return dict(next(card for card in cards if name is None or card["id"] == name))
        except StopIteration:
            raise IsthmusError(f"{self._url} has no model {name!r}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise IsthmusError(f"{self._url} does not answer like a model server") from error

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream, up to ``[DONE]``."""
        answer = self._request("POST", path, body)
        try:
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise IsthmusError(_message(event))
                yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise IsthmusError(f"the answer from {self._url} was cut short: {error}") from error
        finally:
            answer.close()
        raise IsthmusError(f"the answer from {self._url} was cut short")

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._prefix + path, payload, self._headers)
            answer = connection.getresponse()
            if answer.status == 200:
                return answer
            text = answer.read(65536)
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if isinstance(error, socket.timeout):
                reason = "no answer in time"
            raise IsthmusError(
                f"cannot reach {self._url}: {reason}; start a server with 'isthmus serve MODEL' or give --url"
            ) from error
        connection.close()
        raise IsthmusError(f"the server answered {answer.status}: {_text(text)}")


def _text(body: bytes) -> str:
    try:
        return _message(json.loads(body))
    except ValueError:
        return body.decode("utf-8", "replace")[:500]


def _message(event: Any) -> str:
    error = event.get("error") if isinstance(event, dict) else None
    if isinstance(error, dict):
        return str(error.get("message"))
    return str(error if error is not None else event)[:500]
