"""A server's sessions are takes: the same frames, steered at chunk borders, seen by many, within their bytes."""

from __future__ import annotations

import base64
import io
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import longtake
from longtake.serve.client import Client, ServerError
from tests.serving import OTHER, PROMPT, collect, decoded, encoded, until


def chunks_made(client, name: str, count: int):
    until(lambda: client.session(name)["chunk"] >= count)


def test_a_stream_begins_with_its_header_and_a_fragment(client):
    session = client.create(PROMPT, seed=1)
    with client.watch(session["id"]) as stream:
        _, parts = collect(stream, 1)
    assert parts[0][4:8] == b"ftyp" and parts[1][4:8] == b"moof"


def test_a_viewer_from_the_start_sees_every_frame_of_the_take(client, host):
    session = client.create(PROMPT, seed=5, paused=True, pace="free", chunks=3)
    with client.watch(session["id"]) as stream:
        client.steer(session["id"], type="resume")
        messages, parts = collect(stream, 9 + 12 + 12)
    take = longtake.Session(host, prompt=PROMPT, seed=5, keep_latents=True)
    frames = torch.cat([next(take).frames for _ in range(3)]).numpy()
    seen = decoded(b"".join(parts))
    assert seen.shape == frames.shape == (33, 64, 64, 3)
    error = ((seen.astype(float) - frames) ** 2).mean((1, 2, 3))
    assert 10 * np.log10(255**2 / error.max()) > 27  # encoded once, none lost or out of order
    assert [m["index"] for m in messages if m["type"] == "chunk"] == [0, 1, 2]
    assert client.session(session["id"])["state"] == "ended"


def test_two_viewers_get_identical_bytes_after_a_key_frame(client):
    session = client.create(PROMPT, seed=2)
    with client.watch(session["id"]) as first, client.watch(session["id"]) as second:
        _, a = collect(first, 60)
        _, b = collect(second, 60)
    shared = [part for part in a[1:] if part in set(b[1:])]
    start = b.index(shared[0])
    assert a[0] == b[0] and len(shared) >= 40
    assert b[start : start + len(shared)] == shared


def test_a_late_viewer_begins_with_a_key_frame_and_can_decode(client):
    session = client.create(PROMPT, seed=3)
    chunks_made(client, session["id"], 2)
    with client.watch(session["id"]) as stream:
        _, parts = collect(stream, 20)
    assert len(decoded(b"".join(parts))) == 20


def test_a_prompt_change_is_visible_in_the_picture(client):
    """From a dark to a light background."""
    session = client.create(PROMPT, seed=4, pace="free", paused=True)
    client.steer(session["id"], type="resume")
    chunks_made(client, session["id"], 3)
    answer = client.steer(session["id"], type="prompt", text=OTHER, mode="cut")
    assert answer["mode"] == "cut"
    with client.watch(session["id"]) as stream:
        _, parts = collect(stream, 72)
    pictures = decoded(b"".join(parts))
    assert client.session(session["id"])["prompt"] == OTHER
    assert pictures[-12:].mean() > 110, pictures.mean((1, 2, 3)).round().tolist()


@pytest.mark.parametrize("mode", ["keep", "recache", "flush", "cut"])
def test_every_switch_mode_is_obeyed_at_the_next_chunk(client, mode):
    session = client.create(PROMPT, seed=6, pace="free")
    chunks_made(client, session["id"], 2)
    answer = client.steer(session["id"], type="prompt", text=OTHER, mode=mode)
    assert answer["mode"] == mode
    chunks_made(client, session["id"], answer["chunk"] + 3)
    info = client.session(session["id"])
    assert (info["state"], info["error"]) == ("running", None)


def test_pause_stops_and_resume_goes_on(client):
    session = client.create(PROMPT, seed=7, pace="free")
    chunks_made(client, session["id"], 1)
    client.steer(session["id"], type="pause")
    at = encoded(client, session["id"])["chunk"]
    time.sleep(0.3)
    assert client.session(session["id"]) | {"chunk": at} == client.session(session["id"])
    client.steer(session["id"], type="resume")
    chunks_made(client, session["id"], at + 1)


def test_seek_goes_back_to_a_snapshot_and_the_same_frames_follow(client):
    session = client.create(PROMPT, seed=8, pace="free", paused=True)
    name = session["id"]
    with client.watch(name) as stream:
        saved = client.steer(name, type="save")["snapshot"]
        client.steer(name, type="resume")
        _, first = collect(stream, 9)
        client.steer(name, type="pause")
        until(lambda: client.session(name)["state"] == "paused")
        made = encoded(client, name)
        assert client.steer(name, type="seek", snapshot=saved["id"]) == {"chunk": 0}
        assert client.session(name)["chunk"] == 0 and client.session(name)["frames"] == made["frames"]
    with client.watch(name) as stream:
        client.steer(name, type="resume")
        _, again = collect(stream, len(first) - 1 + made["frames"])
    old = decoded(b"".join(first))
    new = decoded(b"".join(again))
    key = next(i for i in range(len(new)) if np.abs(new[i].astype(int) - old[0]).mean() < 2)
    assert np.abs(new[key : key + 9].astype(int) - old).mean() < 3


def test_a_fork_goes_its_own_way_and_leaves_the_other_alone(client):
    session = client.create(PROMPT, seed=9, pace="free", chunks=4)
    until(lambda: client.session(session["id"])["state"] == "ended")
    child = client.fork(session["id"], prompt=OTHER, paused=True)
    assert child["id"] != session["id"] and child["chunk"] == 4 and child["prompt"] == OTHER
    client.delete(session["id"])
    assert client.session(child["id"])["state"] in ("paused", "ended")


def test_another_policy_has_the_history_of_a_take_that_began_with_it(client, host, server):
    """… and was shown the same chunks."""
    session = client.create(PROMPT, seed=10, pace="free", paused=True)
    name = session["id"]
    client.steer(name, type="resume")
    chunks_made(client, name, 3)
    client.steer(name, type="pause")
    answer = client.steer(name, type="policy", policy="window:frames=9,sink=3")
    assert answer["policy"].startswith("window:frames=9")
    take = server[1].service.takes[name]
    logged = [longtake_latents(path) for _, path in sorted(take.place.track.chunks().items())]
    fresh = longtake.Session(host, longtake.SlidingWindow(9, 3), prompt=PROMPT, seed=10)
    for latents in logged:
        fresh.extend(latents)
    ours, theirs = take.session.history.stores["cond"], fresh.history.stores["cond"]
    assert torch.equal(ours.k[:, :, ours.used], theirs.k[:, :, theirs.used])
    assert client.session(name)["reserved_bytes"] < session["reserved_bytes"]


def longtake_latents(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["latents"]


def test_a_recording_is_an_mp4_of_what_was_streamed(client, tmp_path):
    session = client.create(PROMPT, seed=11, pace="free", chunks=3, record=True)
    until(lambda: client.session(session["id"])["recorded_frames"] == 33)
    client.download(session["id"], tmp_path / "take.mp4")
    assert len(decoded((tmp_path / "take.mp4").read_bytes())) == 33


def test_a_first_image_is_the_first_frame(client):
    picture = Image.new("RGB", (200, 100), (200, 60, 40))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    session = client.create(PROMPT, image=image, paused=True, pace="free", chunks=1)
    with client.watch(session["id"]) as stream:
        client.steer(session["id"], type="resume")
        _, parts = collect(stream, 13)
    first = decoded(b"".join(parts))[0]
    assert np.abs(first.mean((0, 1)) - (200, 60, 40)).max() < 40


def test_jpeg_pictures_for_players_that_know_nothing_else(client):
    session = client.create(PROMPT, seed=12)
    with client.watch(session["id"], format="jpeg") as stream:
        _, parts = collect(stream, 3)
    assert Image.open(io.BytesIO(parts[0])).size == (64, 64)
    answer = client._call("GET", f"/v1/sessions/{session['id']}/mjpeg")
    assert answer.readline() == b"--frame\r\n"
    answer.close()
    until(lambda: client.session(session["id"])["viewers"] == 0)


def test_who_comes_late_is_told_what_became_of_the_take(client):
    session = client.create(PROMPT, seed=16, pace="free", paused=True)
    name = session["id"]
    saved = client.steer(name, type="save")["snapshot"]
    with client.watch(name) as early:
        client.steer(name, type="resume")
        chunks_made(client, name, 1)
        client.steer(name, type="pause")
        at = client.session(name)
        client.steer(name, type="prompt", text="never in force", mode="keep")
        client.steer(name, type="prompt", text=OTHER, mode="cut")
        policy = client.steer(name, type="policy", policy="window:frames=9,sink=3")["policy"]
        client.steer(name, type="seek", snapshot=saved["id"])
        heard: list = []
        while len(heard) < 4:
            item = next(iter(early))
            if isinstance(item, dict) and item["type"] == "changed" and item["timeline"]:
                heard.append(item["timeline"])
    with client.watch(name) as late:
        told = late.welcome["timeline"]
    assert told == heard[-1]
    frames = 9 + 12 * (at["chunk"] - 1)
    assert [(m["what"], m["frame"], m["chunk"], m["prompt"]) for m in told] == [
        ("begin", 0, 0, PROMPT), ("prompt", frames, at["chunk"], OTHER), ("policy", frames, at["chunk"], OTHER),
        ("seek", frames, 0, PROMPT),
    ]  # fmt: skip
    assert told[1]["mode"] == "cut" and told[2]["policy"] == policy and saved["frame"] == 0
    until(lambda: not client.session(name)["viewers"])
    client.park(name)
    with client.watch(name) as again:  # it has been on disk
        assert again.welcome["timeline"] == told


def test_steering_over_the_socket_is_answered_there(client):
    session = client.create(PROMPT, seed=13)
    with client.watch(session["id"]) as stream:
        number = stream.steer(type="prompt", text=OTHER, mode="keep")
        wrong = stream.steer(type="policy", policy="no-such-policy")
        answers = {}
        for item in stream:
            if isinstance(item, dict) and item["type"] in ("done", "error"):
                answers[item["id"]] = item
            if len(answers) == 2:
                break
    assert answers[number]["result"]["mode"] == "keep"
    assert answers[wrong]["type"] == "error" and "no policy" in answers[wrong]["error"]["message"]


def test_two_sessions_share_the_device_fairly(client):
    names = [client.create(PROMPT, seed=s, pace="free")["id"] for s in (20, 21, 22)]
    before = [client.session(n)["chunk"] for n in names]
    until(lambda: sum(client.session(n)["chunk"] for n in names) - sum(before) >= 15)
    for n in names:
        client.steer(n, type="pause")
    made = [client.session(n)["chunk"] - b for n, b in zip(names, before, strict=True)]
    assert max(made) - min(made) <= 4


def test_everything_on_disk_is_for_its_user_alone(client, server):
    session = client.create(PROMPT, seed=14, pace="free", record=True)
    chunks_made(client, session["id"], 2)
    client.steer(session["id"], type="save")
    state = server[1].service.settings.state
    for root, _, files in os.walk(state):
        assert stat.S_IMODE(os.stat(root).st_mode) == 0o700
        assert {oct(stat.S_IMODE(os.stat(os.path.join(root, f)).st_mode)) for f in files} <= {"0o600"}, files


def test_deleting_a_session_leaves_nothing(client, server):
    session = client.create(PROMPT, seed=15, pace="free")
    chunks_made(client, session["id"], 1)
    client.delete(session["id"])
    with pytest.raises(ServerError) as error:
        client.session(session["id"])
    assert error.value.status == 404
    assert not (server[1].service.settings.state / session["id"]).exists()
    assert server[1].service.workers[0].ledger.of(session["id"]) == 0


def test_a_client_without_a_server_says_so_in_one_line():
    client = Client("http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(longtake.LongtakeError, match="no server answers at"):
        client.sessions()
    with pytest.raises(longtake.LongtakeError, match="no stream of session 'x' at"), client.watch("x"):
        pass
