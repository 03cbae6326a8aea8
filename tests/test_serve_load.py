"""A server makes nearly as many chunks as a bare loop that encodes what it makes, however many watch, and a viewer that
keeps up misses nothing. `python -m tests.test_serve_load` prints the figures; on a busy machine they mean little."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import longtake
from longtake.serve.fmp4 import sample
from longtake.serve.stream import Encoder
from tests.serving import PROMPT, server_process, until

SESSIONS, VIEWERS, CHUNKS = 3, 4, 16

# A process of viewers: prints, for each, the sequence numbers of its fragments and a digest of its bytes.
_WATCH = """
import hashlib, json, sys, threading
from longtake.serve.client import Client
from longtake.serve.fmp4 import boxes
def watch(name, found):
    with Client(sys.argv[1]).watch(name) as stream:
        parts = []
        for item in stream:
            if isinstance(item, bytes):
                parts.append(item)
            elif item.get("session", {}).get("state") == "ended":
                break
    assert all([kind for kind, _, _ in boxes(part)] == ["moof", "mdat"] for part in parts[1:])
    numbers = [int.from_bytes(part[20:24], "big") for part in parts[1:]]
    found.append([name, numbers, hashlib.sha256(b"".join(parts)).hexdigest()])
found = []
threads = [threading.Thread(target=watch, args=(n, found)) for n in sys.argv[3:] for _ in range(int(sys.argv[2]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""


def bare_loop(host) -> float:
    """Seconds of the same takes in turn, encoded in the same way, without a server."""
    takes = [longtake.Session(host, prompt=PROMPT, seed=s, keep_latents=True) for s in range(SESSIONS)]
    encoders = [Encoder(64, 64, 16.0) for _ in takes]
    started = time.perf_counter()
    for _ in range(CHUNKS):
        for take, encoder in zip(takes, encoders, strict=True):
            for i, frame in enumerate(next(take).frames.numpy()):
                data, key = sample(encoder.encode(frame, i == 0))
                encoder.track.fragment(data, key, i)
    return time.perf_counter() - started


def served(client) -> tuple[float, list]:
    """Seconds from the first `resume` to the last chunk, and what each viewer saw."""
    options = {"paused": True, "pace": "free", "chunks": CHUNKS}
    names = [client.create(PROMPT, seed=s, **options)["id"] for s in range(SESSIONS)]
    command = [sys.executable, "-c", _WATCH, client.url, str(VIEWERS), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watching:
        until(lambda: all(s["viewers"] == VIEWERS for s in client.sessions()), 60)
        started = time.perf_counter()
        for name in names:
            client.steer(name, type="resume")
        until(lambda: all(s["state"] == "ended" for s in client.sessions()), 120)
        seconds = time.perf_counter() - started
        found = json.loads(watching.communicate(timeout=60)[0])
    for name in names:
        client.delete(name)
    return seconds, found


def test_no_viewer_that_keeps_up_misses_or_reorders_a_frame(tmp_path):
    with server_process(tmp_path / "state") as (client, _):
        _, found = served(client)
    frames = 9 + 12 * (CHUNKS - 1)
    assert len(found) == SESSIONS * VIEWERS
    assert all(numbers == list(range(1, frames + 1)) for _, numbers, _ in found)
    assert len({digest for _, _, digest in found}) == SESSIONS  # all viewers of a session got the same bytes


def main() -> None:
    import torch

    torch.set_num_threads(1)  # as the server does for this model
    host = longtake.load("tiny-wan", device="cpu")
    bare_loop(host)
    with tempfile.TemporaryDirectory() as folder, server_process(Path(folder) / "state") as (client, _):
        served(client)
        for _ in range(5):
            bare, (seconds, _) = bare_loop(host), served(client)
            made = SESSIONS * CHUNKS
            print(f"bare {made / bare:.1f}, served {made / seconds:.1f} chunks/s: {bare / seconds:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
