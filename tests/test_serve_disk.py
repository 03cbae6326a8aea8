"""What is on disk is enough to come back from, and a disk that is really full costs nothing that was committed."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import longtake
from longtake.serve.client import ServerError
from longtake.serve.parking import Track, noise_state, replayable
from longtake.serve.recording import Recording
from longtake.serve.stream import Channel
from tests.serving import OTHER, PROMPT, decoded, encoded, serving, until
from tests.skyreels import tiny_skyreels
from tests.test_serve_faults import logged


@dataclass
class Disk:
    """A folder, and what leaves no room behind it."""

    folder: Path
    fill: Callable[[], None]
    free: Callable[[], None]


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A file system of 48 MB; where this user may not mount one, the test is skipped."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here; the limit on files is tested in any case")
    filler = folder / "filler"

    def fill() -> None:
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    try:
        yield Disk(folder, fill, filler.unlink)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def limited_files(folder: Path) -> Iterator[Disk]:
    """No file may grow while `fill` is in force: the kernel answers EFBIG to every write."""
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    free = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        yield Disk(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard)), free)
    finally:
        free()


@pytest.fixture(params=[small_disk, limited_files])
def disk(request, tmp_path):
    with request.param(tmp_path / "disk") as made:
        yield made


def begun(client) -> tuple[str, int]:
    """A session that has made some chunks and stands still, and how many."""
    name = client.create(PROMPT, seed=7, pace="free", num_inference_steps=1)["id"]
    until(lambda: client.session(name)["chunk"] >= 2)
    client.steer(name, type="pause")
    return name, encoded(client, name)["chunk"]


def goes_on(client, host, state: Path, name: str, at: int) -> None:
    """The session makes another chunk, and all of them are those of a take that nothing happened to."""
    client.steer(name, type="resume")
    until(lambda: client.session(name)["chunk"] > at)
    client.steer(name, type="pause")
    made = logged(state, name)
    assert sorted(made) == list(range(len(made))) and len(made) > at
    take = longtake.Session(host, prompt=PROMPT, seed=7, keep_latents=True, num_inference_steps=1)
    assert all(torch.equal(next(take).latents, made[i][0]) for i in range(len(made)))


def test_a_full_disk_refuses_what_it_cannot_keep_and_shows_nothing_that_is_not_logged(disk, host):
    state = disk.folder / "state"
    with serving(host, state) as (client, server):
        name, at = begun(client)
        frames, folders = client.session(name)["frames"], sorted(os.listdir(state))
        disk.fill()
        try:
            attempts = [
                lambda: client.park(name), lambda: client.steer(name, type="prompt", text=OTHER, mode="cut"),
                lambda: client.steer(name, type="save"), lambda: client.create(PROMPT), lambda: client.fork(name),
            ]  # fmt: skip
            for attempt in attempts:
                with pytest.raises(ServerError) as refusal:
                    attempt()
                assert refusal.value.problem["code"] == "storage_full" and refusal.value.status == 507
                assert str(state) not in str(refusal.value)
            client.steer(name, type="resume")
            until(lambda: client.session(name)["error"] is not None)
            info = client.session(name)
            assert (info["state"], info["chunk"], info["frames"], info["prompt"]) == ("paused", at, frames, PROMPT)
            assert "could not be written" in info["error"] and len(client.sessions()) == 1
        finally:
            disk.free()
        assert sorted(os.listdir(state)) == folders and server.service.workers[0].ledger.reserved > 0
        assert client.session(name)["snapshots"] == [] and not list((state / name).glob("saved/*"))
        goes_on(client, host, state, name, at)
        assert client.park(name)["state"] == "parked"


def test_a_server_that_ends_on_a_full_disk_leaves_all_that_was_committed(disk, host):
    state = disk.folder / "state"
    with serving(host, state) as (client, _):
        name, at = begun(client)
        disk.fill()
    disk.free()
    with serving(host, state) as (client, _):
        assert client.session(name)["chunk"] == at
        goes_on(client, host, state, name, at)


def test_a_recording_ends_with_its_last_whole_frame_where_the_disk_is_full(disk):
    channel, path = Channel(64, 64, 16.0, 1.0), disk.folder / "record.mp4"
    noise = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    recording = Recording(path, 10**9)
    channel.record(recording)
    channel.publish(noise)
    disk.fill()
    channel.publish(noise)
    disk.free()
    channel.publish(noise)  # it has ended: a gap would be worse
    assert recording.full and 6 <= recording.frames < 12
    channel.record(None)
    assert len(decoded(path.read_bytes())) == recording.frames


# --- coming back ----------------------------------------------------------------------------------------------------


def log_chunks(track: Track, take: longtake.Session, count: int) -> list[torch.Tensor]:
    made = []
    for _ in range(count):
        made.append(next(take).latents)
        track.append(take.index - 1, made[-1][None], noise_state(take), 0)
    return made


SCORING = ["packforcing:sink=1,recent=1,top_k=1", "deep-forcing:frames=12,sink=1,recent=1,top=2"]


@pytest.mark.parametrize("policy", SCORING)
def test_a_take_whose_commit_passes_do_not_suffice_is_made_again_from_the_log(host, tmp_path, policy):
    """… a prompt change in between included, and goes on as though nothing had happened."""
    options = {"policy": longtake.policies.parse(policy), "num_inference_steps": 1, "keep_latents": True}
    take = longtake.Session(host, prompt=PROMPT, seed=3, **options)
    assert not replayable(take)
    track = Track.begin(tmp_path / "t000001")
    track.save(take)
    log_chunks(track, take, 4)
    take.switch(OTHER, "recache")
    track.note({"at": take.index, "text": OTHER, "mode": "recache"})
    log_chunks(track, take, 1)
    again, recovery = Track(track.folder).restore(host)
    assert (recovery.snapshot_chunk, recovery.remade_chunks, recovery.replayed_chunks) == (0, 5, 0) and recovery.exact
    assert torch.equal(next(take).latents, next(again).latents)


def test_chunks_in_flight_together_are_made_again_too(tmp_path):
    host = tiny_skyreels()
    words = torch.randn(2, 1, 7, 10, generator=torch.Generator().manual_seed(1))
    take = longtake.Session(host, prompt_embeds=words[0], negative_prompt_embeds=words[1], seed=3, decode=False)
    track = Track.begin(tmp_path / "t000001")
    log_chunks(track, take, 1)
    track.save(take)
    log_chunks(track, take, 2)
    again, recovery = Track(track.folder).restore(host)
    assert (recovery.snapshot_chunk, recovery.remade_chunks) == (1, 2) and recovery.exact
    assert torch.equal(next(take).latents, next(again).latents)


def test_where_a_chunk_comes_out_otherwise_what_was_shown_counts_and_the_session_says_so(host, tmp_path):
    """As on another machine: the log is committed as it is."""
    policy = longtake.policies.parse("packforcing:sink=1,recent=1,top_k=1")
    take = longtake.Session(host, policy, prompt=PROMPT, seed=3, num_inference_steps=1, keep_latents=True)
    track = Track.begin(tmp_path / "t000001")
    track.save(take)
    made = log_chunks(track, take, 2)
    shown = made[1] + 1e-3
    track.append(1, shown[None], noise_state(take), 0)
    again, recovery = Track(track.folder).restore(host)
    assert not recovery.exact and (recovery.replayed_chunks, recovery.remade_chunks) == (2, 0)
    assert again.index == 2 and torch.equal(again.rollout.kept[max(again.rollout.kept)][0], shown)
    assert torch.equal(noise_state(again)[0], noise_state(take)[0])
