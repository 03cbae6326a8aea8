"""The other end, for Python programs: the standard library for requests, `websockets` for the stream.

```
client = Client("http://127.0.0.1:8000")
session = client.create(prompt="a red ball bouncing on a dark background")
with client.watch(session["id"]) as stream:
    for item in stream:                     # dict: a message; bytes: the MP4, header first
        ...
client.steer(session["id"], type="prompt", text="… at night", mode="recache")
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from ..errors import LongtakeError
from .protocol import VERSION

_BLOCK = 1 << 18
_ENDS = (1000, 1001, 1012)  # WebSocket codes of an end that was meant


class ServerError(LongtakeError):
    """What the server refused: its HTTP status (0 over a WebSocket), and the problem as it was told."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("message", "refused"))
        self.status, self.problem = status, problem


class Client:
    """A server's REST interface. Answers are the JSON objects of the protocol. Raises ServerError for refusals,
    LongtakeError if there is no server."""

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 60) -> None:
        self.url, self.token, self.timeout = url.rstrip("/"), token, timeout

    def models(self) -> list[dict[str, Any]]:
        return self._json("GET", "/v1/models")

    def policies(self) -> list[dict[str, Any]]:
        return self._json("GET", "/v1/policies")

    def create(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Options as in `protocol.NewSession`; `image` as base64."""
        return self._json("POST", "/v1/sessions", {"prompt": prompt, **options})

    def sessions(self) -> list[dict[str, Any]]:
        return self._json("GET", "/v1/sessions")

    def session(self, name: str) -> dict[str, Any]:
        return self._json("GET", self._path(name))

    def steer(self, name: str, **action: Any) -> dict[str, Any]:
        """`type` is prompt, pause, resume, policy, seek, record or save; the rest as in `protocol`."""
        return self._json("POST", self._path(name, "steer"), {"action": action})

    def fork(self, name: str, **options: Any) -> dict[str, Any]:
        """Options as in `protocol.Fork`: `snapshot`, `prompt`, `chunks` that are to come, `paused`."""
        return self._json("POST", self._path(name, "fork"), options)

    def park(self, name: str) -> dict[str, Any]:
        return self._json("POST", self._path(name, "park"))

    def delete(self, name: str) -> None:
        self._call("DELETE", self._path(name)).close()

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        self._call("DELETE", self._path(name, "snapshots", snapshot)).close()

    def download(self, name: str, path: str | Path) -> int:
        """Write the recording so far to an MP4; returns its bytes."""
        size = 0
        with self._call("GET", self._path(name, "recording")) as answer, open(path, "wb") as file:
            while block := answer.read(_BLOCK):
                size += file.write(block)
        return size

    def watch(self, name: str, format: str = "mp4") -> Stream:
        """The session's stream, as a context manager."""
        return Stream(self, name, format)

    def _path(self, *parts: str) -> str:
        return "/v1/sessions/" + "/".join(quote(part, safe="") for part in parts)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with self._call(method, path, body) as answer:
            return json.load(answer)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"content-type": "application/json"}
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self.url + path, data, headers, method=method), timeout=self.timeout)
        except HTTPError as error:
            with error:
                raise ServerError(error.code, _problem(error.read())) from None
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise LongtakeError(f"no server answers at {self.url}: {reason}") from error


class Stream:
    """What comes to a viewer, in order: dicts are messages, bytes are video. Ends with the session or the server.
    Raises LongtakeError if the connection breaks."""

    def __init__(self, client: Client, name: str, format: str) -> None:
        self._client, self._name, self._format = client, name, format
        self._asked = 0
        self.welcome: dict[str, Any] = {}

    def __enter__(self) -> Stream:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        parts = urlsplit(self._client.url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        address = f"{scheme}://{parts.netloc}{parts.path}{self._client._path(self._name, 'watch')}"
        try:
            self.socket = connect(address, max_size=None, compression=None, open_timeout=self._client.timeout)
        except (OSError, WebSocketException) as error:
            raise LongtakeError(f"no stream of session {self._name!r} at {self._client.url}: {error}") from error
        hello = {"type": "hello", "version": VERSION, "token": self._client.token, "format": self._format}
        self.socket.send(json.dumps(hello))
        first = json.loads(self.socket.recv(timeout=self._client.timeout))
        if first["type"] != "welcome":
            self.socket.close()
            raise ServerError(0, first.get("error", {}))
        self.welcome = first
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def __iter__(self) -> Iterator[dict[str, Any] | bytes]:
        from websockets.exceptions import ConnectionClosed

        while True:
            try:
                item = self.socket.recv()
            except ConnectionClosed as end:
                if end.rcvd is not None and end.rcvd.code in _ENDS:
                    return
                raise LongtakeError(f"the stream was cut off: {end}") from end
            yield json.loads(item) if isinstance(item, str) else item

    def steer(self, **action: Any) -> int:
        """Ask for an action; the answer comes among the messages, `done` or `error`, with the number returned."""
        self._asked += 1
        self.socket.send(json.dumps({"type": "steer", "id": self._asked, "action": action}))
        return self._asked


def _problem(body: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return {"code": "http", "message": body[:200].decode("latin1")}
