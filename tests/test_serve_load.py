"""A server makes nearly as many chunks as a bare loop that encodes what it makes, however many watch."""

from __future__ import annotations

import json
import threading
import time

import longtake
from longtake.serve.fmp4 import boxes, sample
from longtake.serve.stream import Encoder
from tests.serving import PROMPT, serving, until

SESSIONS, VIEWERS, CHUNKS = 3, 4, 16


def frame_numbers(parts: list[bytes]) -> list[int]:
    """The sequence numbers of fragments, from 1."""
    numbers = []
    for part in parts:
        assert [name for name, _, _ in boxes(part)] == ["moof", "mdat"]
        numbers.append(int.from_bytes(part[20:24], "big"))
    return numbers


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


def test_many_sessions_and_viewers_cost_little_and_no_viewer_misses_a_frame(tmp_path, capsys):
    host = longtake.load("tiny-wan", device="cpu")
    bare_loop(host)
    ratios = []
    for attempt in range(3):
        with serving(host, tmp_path / f"state{attempt}", snapshot_every=16) as (client, _):
            names = [
                client.create(PROMPT, seed=s, paused=True, pace="free", chunks=CHUNKS)["id"] for s in range(SESSIONS)
            ]
            seen: dict[tuple[str, int], list[bytes]] = {}

            def watch(name: str, number: int, client=client, seen=seen) -> None:
                with client.watch(name) as stream:
                    parts = seen[(name, number)] = []
                    for item in stream.socket:
                        if isinstance(item, bytes):
                            parts.append(item)
                        elif json.loads(item).get("session", {}).get("state") == "ended":
                            return

            threads = [threading.Thread(target=watch, args=(n, v)) for n in names for v in range(VIEWERS)]
            for thread in threads:
                thread.start()
            for name in names:
                until(lambda name=name, client=client: client.session(name)["viewers"] == VIEWERS)
            started = time.perf_counter()
            for name in names:
                client.steer(name, type="resume")
            for thread in threads:
                thread.join(120)
            served = time.perf_counter() - started
            frames = 9 + 12 * (CHUNKS - 1)
            for parts in seen.values():
                assert frame_numbers(parts[1:]) == list(range(1, frames + 1))
            assert len({b"".join(seen[(names[0], v)]) for v in range(VIEWERS)}) == 1
        ratios.append(bare_loop(host) / served)
    with capsys.disabled():
        print(f"\nserved / bare throughput: {', '.join(f'{r:.2f}' for r in ratios)}")  # noqa: T201
    assert max(ratios) >= 0.9
