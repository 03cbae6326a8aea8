"""A real server on loopback, for tests: uvicorn in a thread of this process, or in a process of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np

import longtake
from longtake.hosts.base import Host
from longtake.serve.access import Tokens
from longtake.serve.client import Client, Stream
from longtake.serve.server import Server, service_of
from longtake.serve.settings import Settings

PROMPT = "a red ball bouncing on a dark background"
OTHER = "a green square moving on a light background"


@contextmanager
def serving(
    host: Host, state: Path, tokens: dict[str, str] | None = None, memory: int = 10**9, **settings: Any
) -> Iterator[tuple[Client, Server]]:  # fmt: skip
    """A server whose only model is `tiny-shapes`; ends as at a signal."""
    options = {"creations_per_minute": 10**6} | settings
    service = service_of([{"tiny-shapes": host}], Settings(state=state, **options), memory)
    server = Server(service, Tokens(tokens), port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield Client(f"http://127.0.0.1:{server.address[1]}", next(iter((tokens or {}).values()), None)), server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def server_process(state: Path, *arguments: str, limit_file_size: int | None = None) -> Iterator[tuple[Client, Any]]:
    """`longtake serve` as users start it, with the model of `serving`."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--port", str(port), "--state", str(state)]
    command = [sys.executable, "-m", "longtake", "serve", "--model", "tiny-shapes", *where, *arguments]
    log = open(state.with_suffix(".log"), "ab")  # noqa: SIM115
    process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    client = Client(f"http://127.0.0.1:{port}")
    try:
        until(lambda: answers(client) or process.poll() is not None, 90)
        assert process.poll() is None, state.with_suffix(".log").read_text()
        yield client, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        log.close()


def answers(client: Client) -> bool:
    with suppress(longtake.LongtakeError, OSError):
        client._call("GET", "/readyz").close()
        return True
    return False


def until(condition: Any, seconds: float = 60) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def encoded(client: Client, name: str) -> dict[str, Any]:
    """A session of `tiny-shapes` that stands still, when the encoder, which is behind, has all its chunks."""
    frames = 12 * client.session(name)["chunk"] - 3
    until(lambda: client.session(name)["frames"] == frames)
    return client.session(name)


def collect(stream: Stream, frames: int) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Messages and binary items of a stream until it has given so many fragments behind its header."""
    messages, parts = [stream.welcome], []
    for item in stream:
        if isinstance(item, dict):
            messages.append(item)
        else:
            parts.append(item)
        if len(parts) > frames:
            return messages, parts
    return messages, parts


def decoded(data: bytes) -> np.ndarray:
    """The pictures of an MP4, [T, H, W, 3]."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
