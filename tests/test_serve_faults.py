"""What goes wrong around a server costs nobody a committed chunk, and nobody sees what is another's."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import longtake
from longtake.serve.client import Client, ServerError
from longtake.serve.protocol import Message
from longtake.serve.recording import Recording
from longtake.serve.stream import Channel, Viewer
from tests.serving import OTHER, PROMPT, answers, collect, decoded, server_process, serving, until

TOKENS = {"ada": "a" * 32, "bob": "b" * 32}


@pytest.fixture(scope="module")
def guarded(host, tmp_path_factory):
    """A server with two owners."""
    state = tmp_path_factory.mktemp("guarded") / "state"
    with serving(host, state, TOKENS, max_image_pixels=10**6) as (client, server):
        yield client, Client(client.url, TOKENS["bob"]), server


def logged(state, name: str) -> dict[int, torch.Tensor]:
    folder = state / name
    track = folder / json.loads((folder / "session.json").read_text())["track"]
    return {int(p.stem[6:]): load_file(p)["latents"] for p in sorted(track.glob("chunk-*.safetensors"))}


# --- the end of a process -------------------------------------------------------------------------------------------


def test_a_killed_server_loses_nothing_that_was_committed(tmp_path, host):
    """… and goes on as though it had never been killed: the same latents, bit for bit, prompt change included."""
    state = tmp_path / "state"
    with server_process(state, "--snapshot-every", "4") as (client, process):
        name = client.create(PROMPT, seed=3, pace="free")["id"]
        until(lambda: client.session(name)["chunk"] >= 5)
        switched = client.steer(name, type="prompt", text=OTHER, mode="recache")["chunk"]
        until(lambda: client.session(name)["chunk"] >= switched + 1)
        seen = client.session(name)["chunk"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = logged(state, name)
    assert sorted(before) == list(range(len(before))) and len(before) >= seen
    with server_process(state) as (client, process):
        assert client.session(name)["state"] == "parked" and client.session(name)["chunk"] == len(before)
        with client.watch(name) as stream:
            told, frames = stream.welcome["timeline"], stream.welcome["session"]["frames"]
        assert [(m["what"], m["chunk"], m["frame"]) for m in told[1:]] == [("prompt", switched, 12 * switched - 3)]
        assert frames >= 12 * len(before) - 3  # the stream's clock does not begin anew
        client.steer(name, type="resume")
        until(lambda: client.session(name)["chunk"] >= len(before) + 4)
        client.steer(name, type="pause")
        recovery = client.session(name)["recovery"]
    assert recovery["snapshot_chunk"] + recovery["replayed_chunks"] == len(before) and recovery["replayed_chunks"] < 5
    assert 0 < recovery["seconds"] < 10
    after = logged(state, name)
    take = longtake.Session(host, prompt=PROMPT, seed=3, keep_latents=True)
    for index in range(len(before) + 4):
        if index == switched:
            take.switch(OTHER, "recache")
        assert torch.equal(next(take).latents, after[index][0]), index


def test_sigterm_finishes_the_chunk_parks_and_exits(tmp_path):
    state = tmp_path / "state"
    with server_process(state) as (client, process):
        name = client.create(PROMPT, seed=4, pace="free")["id"]
        with client.watch(name) as stream:
            collect(stream, 12)
            process.send_signal(signal.SIGTERM)
            last = [item for item in stream if isinstance(item, dict)][-1]
        assert process.wait(40) in (0, -signal.SIGTERM)
    assert last["type"] == "bye"
    told = json.loads((state / name / "session.json").read_text())
    assert told["awake"] is False
    newest = sorted((state / name / told["track"]).glob("base-*"))[-1].name
    assert int(newest.split("-")[1]) == max(logged(state, name)) + 1
    lines = [json.loads(line) for line in state.with_suffix(".log").read_text().splitlines() if line.startswith("{")]
    assert any(line["message"] == "session parked" and line["session"] == name for line in lines)


def test_two_servers_do_not_share_a_folder(host, tmp_path):
    with (
        serving(host, tmp_path / "state"),
        pytest.raises(longtake.LongtakeError, match="running server"),
        serving(host, tmp_path / "state"),
    ):
        pass


# --- parking --------------------------------------------------------------------------------------------------------


def test_a_parked_session_comes_back_bit_exact(host, tmp_path):
    with serving(host, tmp_path / "state") as (client, server):
        name = client.create(PROMPT, seed=5, pace="free", chunks=5)["id"]
        until(lambda: client.session(name)["chunk"] >= 2)
        client.steer(name, type="pause")
        assert client.park(name)["state"] == "parked" and client.session(name)["held_bytes"] == 0
        assert server.service.workers[0].ledger.reserved == 0
        client.steer(name, type="resume")
        until(lambda: client.session(name)["state"] == "ended")
        made = logged(server.service.settings.state, name)
    take = longtake.Session(host, prompt=PROMPT, seed=5)
    for index in range(5):
        assert torch.equal(next(take).latents, made[index][0]), index


def test_an_idle_session_is_parked_by_itself_and_a_viewer_wakes_it(host, tmp_path):
    with serving(host, tmp_path / "state", idle_seconds=0.3) as (client, _):
        name = client.create(PROMPT, seed=6)["id"]
        until(lambda: client.session(name)["state"] == "parked")
        with client.watch(name) as stream:
            _, parts = collect(stream, 12)
        assert len(decoded(b"".join(parts))) == 12


def test_damaged_newest_snapshot_and_log_line_fall_back_to_what_is_whole(host, tmp_path):
    with serving(host, tmp_path / "state", snapshot_every=2) as (client, server):
        name = client.create(PROMPT, seed=9, pace="free", chunks=5)["id"]
        until(lambda: client.session(name)["state"] == "ended")
        client.park(name)
        track = server.service.takes[name].place.track
        newest = track.bases()[-1].path
        newest.write_bytes(newest.read_bytes()[:1000])
        (track.folder / "events.jsonl").write_text('{"at": 9')
        client.steer(name, type="pause")
        recovery = client.session(name)["recovery"]
        assert recovery["snapshot_chunk"] + recovery["replayed_chunks"] == 5 and recovery["replayed_chunks"] >= 1


# --- viewers --------------------------------------------------------------------------------------------------------


def test_a_slow_viewer_loses_fragments_resumes_at_a_key_frame_and_slows_nobody():
    async def watch() -> None:
        loop = asyncio.get_running_loop()
        channel = Channel(64, 64, 16.0, 0.5)
        slow, fast = Viewer(loop, "mp4", 20_000), Viewer(loop, "mp4", 10**8)
        for viewer in (slow, fast):
            channel.attach(viewer, _Note())
        noise = np.random.default_rng(0)
        started = time.monotonic()
        for _ in range(8):
            channel.publish(noise.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
        for _ in range(2):  # little to send: there is room for it from its first key frame on
            channel.publish(np.zeros((12, 64, 64, 3), dtype=np.uint8))
        assert time.monotonic() - started < 5
        for viewer in (slow, fast):
            viewer.close()
        kept = [item async for item in _items(slow)]
        every = [item async for item in _items(fast)]
        assert len([i for i in every if i.key is not None]) == 120 and fast.dropped == 0
        video = [i for i in kept if i.key is not None]
        assert slow.dropped + len(video) == 120 and slow.dropped > 0
        notes = [i for i, item in enumerate(kept) if item.lost]
        assert notes and all(kept[i + 1].key for i in notes) and sum(kept[i].lost for i in notes) <= slow.dropped
        assert sum(len(i.payload) for i in video) < 60_000

    asyncio.run(watch())


class _Note(Message):
    type: str = "note"


async def _items(viewer: Viewer):
    while (item := await viewer.next()) is not None:
        yield item


def test_a_viewer_that_vanishes_is_forgotten_and_the_take_goes_on(guarded):
    client, _, _ = guarded
    name = client.create(PROMPT, pace="free")["id"]
    stream = client.watch(name).__enter__()
    stream.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.socket.close()  # a reset: no goodbye
    until(lambda: client.session(name)["viewers"] == 0)
    at = client.session(name)["chunk"]
    until(lambda: client.session(name)["chunk"] > at + 1)
    client.delete(name)


def test_a_recording_cut_by_a_kill_is_mended_and_goes_on(tmp_path):
    channel, path = Channel(64, 64, 16.0, 1.0), tmp_path / "record.mp4"
    pictures = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    channel.record(Recording(path, 10**8))
    channel.publish(pictures)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    channel.record(Recording(path, 10**8))
    assert channel.recording is not None and channel.recording.frames == 5
    channel.publish(pictures)
    channel.record(None)
    assert len(decoded(path.read_bytes())) == 11
    full = Recording(path, path.stat().st_size + 10)
    channel.record(full)
    channel.publish(pictures)
    assert full.full and len(decoded(path.read_bytes())) == 11


# --- who and what ---------------------------------------------------------------------------------------------------


def test_another_token_cannot_see_or_touch_a_session(guarded):
    ada, bob, _ = guarded
    name = ada.create(PROMPT, paused=True, record=True)["id"]
    saved = ada.steer(name, type="save")["snapshot"]["id"]
    assert bob.sessions() == [] and len(ada.sessions()) == 1
    tries = [
        lambda: bob.session(name), lambda: bob.steer(name, type="resume"), lambda: bob.fork(name),
        lambda: bob.park(name), lambda: bob.delete(name), lambda: bob.delete_snapshot(name, saved),
        lambda: bob._call("GET", f"/v1/sessions/{name}/recording"),
        lambda: bob._call("GET", f"/v1/sessions/{name}/mjpeg"),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(ServerError) as refusal:
            attempt()
        assert refusal.value.status == 404 and refusal.value.problem["code"] == "no_session"
    with pytest.raises(ServerError, match="no such session"), bob.watch(name):
        pass
    own = bob.create(PROMPT, paused=True)["id"]
    with pytest.raises(ServerError, match="no such snapshot"):
        bob.steer(own, type="seek", snapshot=saved)
    for client in (ada, bob):
        for session in client.sessions():
            client.delete(session["id"])


@pytest.mark.parametrize("token", [None, "", "a" * 31, "a" * 33, "é" * 32])
def test_without_a_right_token_nothing_is_served(guarded, token):
    client, _, _ = guarded
    stranger = Client(client.url, None)
    headers = {} if token is None else {"Authorization": b"Bearer " + token.encode()}
    for path in ("/v1/models", "/v1/sessions", "/v1/policies", "/metrics"):
        assert request(client, "GET", path, headers)[0] == 401
    wrong = Client(client.url, token if token and token.isascii() else None)
    with pytest.raises(ServerError) as refusal, wrong.watch("x"):
        pass
    assert refusal.value.problem["code"] == "token"
    assert answers(stranger)  # health and readiness are for everybody


def test_a_token_in_the_address_is_no_token(guarded):
    client, _, _ = guarded
    assert request(client, "GET", f"/v1/sessions?token={TOKENS['ada']}")[0] == 401


def request(client: Client, method: str, path: str, headers=(), body: bytes | None = None) -> tuple[int, bytes]:
    where = client.url.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in dict(headers), skip_accept_encoding=True)
    given = dict(headers)
    if body is not None and "Content-Length" not in given:
        given["Content-Length"] = str(len(body))
    for key, value in given.items():
        connection.putheader(key, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    result = answer.status, answer.read()
    connection.close()
    return result


AUTH = {"Authorization": f"Bearer {TOKENS['ada']}", "Content-Type": "application/json"}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/sessions/../../etc/passwd", "/v1/sessions/%2e%2e%2f%2e%2e%2fetc%2fpasswd/recording", "//etc/passwd",
        "/v1/sessions/..%5c..%5cwindows", "/v1/sessions/%00", "/v1/sessions/" + "a" * 5000, "/page/../server.py",
        "/v1/sessions/lock", "/%2e%2e/app.py",
    ],
)  # fmt: skip
def test_paths_lead_nowhere_but_to_sessions(guarded, path):
    status, body = request(guarded[0], "GET", path, AUTH)
    assert status in (400, 404, 414), body
    assert b"root:" not in body and b"import" not in body


def test_pages_of_other_sites_and_borrowed_names_are_refused(host, tmp_path, guarded):
    client, _, _ = guarded
    name = client.create(PROMPT, paused=True)["id"]
    body = json.dumps({"prompt": PROMPT}).encode()
    assert request(client, "POST", "/v1/sessions", AUTH | {"Origin": "http://evil.example"}, body)[0] == 403
    assert request(client, "POST", "/v1/sessions", AUTH | {"Origin": "null"}, body)[0] == 403
    assert request(client, "GET", "/v1/sessions", AUTH | {"Host": "evil.example"})[0] == 421
    own = client.url
    assert request(client, "GET", "/v1/sessions", AUTH | {"Origin": own})[0] == 200
    address = f"{own.replace('http', 'ws')}/v1/sessions/{name}/watch"
    with pytest.raises(InvalidStatus):
        connect(address, origin="http://evil.example")
    connect(address, origin=own).close()
    assert b"access-control" not in raw_headers(client).lower()
    client.delete(name)


def raw_headers(client: Client) -> bytes:
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while block := connection.recv(65536):
            data += block
    return data.split(b"\r\n\r\n")[0]


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "/tmp/evil.py:Policy"}, {"policy": "evil.py:Policy"}, {"policy": "window:frames=-1"},
        {"policy": "window:frames=99999999999"}, {"policy": "no-such"}, {"policy": "full"},
        {"reuse": "replay:/etc/passwd"},
        {"model": "/etc"}, {"model": "owner/hub-model"}, {"model": "tiny-shapes/../tiny-shapes"},
        {"prompt": "x" * 2001}, {"prompt": ""}, {"width": 65},
        {"width": 8192, "height": 8192}, {"width": -64}, {"seed": -1}, {"seed": 2**63},
        {"image": "!!!"}, {"image": base64.b64encode(b"GIF89a").decode()}, {"unknown": 1}, {"chunks": 0},
        {"guidance_scale": "nan"}, {"num_inference_steps": 10**9}, {"pace": "warp"}, {"output": "/tmp/x.mp4"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line_that_says_what_is_right(guarded, options):
    client, _, server = guarded
    with pytest.raises(ServerError) as refusal:
        client.create(**({"prompt": PROMPT} | options))
    assert refusal.value.status in (422, 503), refusal.value.problem
    message = refusal.value.problem["message"]
    assert message and "\n" not in message and "x" * 100 not in message and len(message) < 1000
    assert client.sessions() == []
    assert server.service.workers[0].ledger.reserved == 0
    assert [p.name for p in server.service.settings.state.iterdir()] == ["lock"]


def test_image_bombs_and_large_bodies_are_refused(guarded):
    client, _, _ = guarded

    def png(width: int, height: int) -> bytes:
        def part(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = part(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(bytes(10**6))) + part(b"IEND", b"")

    for width, height in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (1001, 1000)):
        with pytest.raises(ServerError, match=r"pixels|PNG, JPEG"):
            client.create(PROMPT, image=base64.b64encode(png(width, height)).decode())
    with pytest.raises(ServerError, match="damaged"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "PNG")
        client.create(PROMPT, image=base64.b64encode(buffer.getvalue()[:60]).decode())
    assert request(client, "POST", "/v1/sessions", AUTH | {"Content-Length": str(10**9)}, b"")[0] == 413
    blocks = b"".join(b"%x\r\n%s\r\n" % (10**6, b" " * 10**6) for _ in range(14)) + b"0\r\n\r\n"
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/sessions HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: {AUTH['Authorization']}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        try:
            connection.sendall(blocks)
            assert b" 413 " in connection.recv(200)
        except ConnectionError:
            pass  # it hung up on us
    assert answers(client)


@pytest.mark.parametrize(
    ("first", "code", "closed"),
    [
        ('{"type": "hello", "version": 2, "new": true}', "version", 4426), ('{"type": "hello"}', "malformed", 4400),
        ("not json", "malformed", 4400), ("[" * 50_000, "malformed", 4400), ("null", "malformed", 4400),
        ('{"type": "hello", "version": 1, "format": "avi"}', "malformed", 4400), (b"\0\1\2", "malformed", 4400),
        ('{"type": "hello", "version": 1, "token": "wrong"}', "token", 4401),
        ('{"type": "hello", "version": 1, "token": "%s"}' % ("b" * 32), "no_session", 4404),
    ],
)  # fmt: skip
def test_a_wrong_first_message_is_answered_and_the_socket_closed(guarded, first, code, closed):
    client, _, _ = guarded
    name = client.create(PROMPT, paused=True)["id"]
    with connect(f"{client.url.replace('http', 'ws')}/v1/sessions/{name}/watch") as socket:
        socket.send(first)
        assert json.loads(socket.recv(timeout=10))["error"]["code"] == code
        with pytest.raises(ConnectionClosed) as end:
            socket.recv(timeout=10)
        assert end.value.rcvd is not None and end.value.rcvd.code == closed
    client.delete(name)


def test_wrong_messages_of_a_viewer_are_answered_and_an_oversized_one_ends_it(guarded):
    client, _, _ = guarded
    name = client.create(PROMPT, paused=True)["id"]
    with client.watch(name) as stream:
        for text in ("", "{}", '{"type": "steer"}', '{"type": "steer", "action": {"type": "delete"}}', "[1]", b"\0"):
            stream.socket.send(text)
        for text in ('{"type":"steer","action":{"type":"seek","snapshot":"../../x"}}', "1" * 60_000):
            stream.socket.send(text)
        failures: list = []
        while len(failures) < 8:
            item = stream.socket.recv(timeout=10)
            if isinstance(item, str) and json.loads(item)["type"] == "error":
                failures.append(json.loads(item))
        assert {f["error"]["code"] for f in failures} == {"malformed"}
        stream.socket.send("x" * 100_000)
        with pytest.raises(ConnectionClosed):
            while True:
                stream.socket.recv(timeout=10)
    assert client.session(name)["state"] == "paused"
    client.delete(name)


def test_a_socket_that_never_says_hello_is_closed(host, tmp_path):
    with (
        serving(host, tmp_path / "state", hello_seconds=0.3) as (client, _),
        connect(f"{client.url.replace('http', 'ws')}/v1/sessions/x/watch") as socket,
    ):
        assert json.loads(socket.recv(timeout=10))["error"]["code"] == "hello"


def test_quotas_hold_also_when_many_ask_at_once(host, tmp_path):
    with serving(host, tmp_path / "state", sessions_per_token=3, saved_per_session=2) as (client, _):

        def begin(seed: int) -> int:
            try:
                client.create(PROMPT, seed=seed, paused=True)
            except ServerError as error:
                return error.status
            return 201

        with ThreadPoolExecutor(8) as pool:
            statuses = sorted(pool.map(begin, range(8)))
        assert statuses == [201] * 3 + [429] * 5 and len(client.sessions()) == 3
        name = client.sessions()[0]["id"]
        for _ in range(2):
            client.steer(name, type="save")
        with pytest.raises(ServerError, match="delete one first"):
            client.steer(name, type="save")
    with serving(host, tmp_path / "other", creations_per_minute=2) as (client, _):
        statuses = [begin_status(client, seed) for seed in range(3)]
        assert statuses == [201, 201, 429]
    with serving(host, tmp_path / "third", disk_bytes_per_token=1000) as (client, _):
        assert begin_status(client, 0) == 201 and begin_status(client, 1) == 507


def begin_status(client: Client, seed: int) -> int:
    try:
        client.create(PROMPT, seed=seed, paused=True)
    except ServerError as error:
        return error.status
    return 201


def test_what_is_old_is_deleted(host, tmp_path):
    with serving(host, tmp_path / "state", ttl_seconds=0.2) as (client, server):
        name = client.create(PROMPT, paused=True)["id"]
        client.steer(name, type="save")
        time.sleep(0.3)
        server.service.sweep()
        assert client.session(name)["snapshots"] == []  # awake, so it stays itself
        client.park(name)
        time.sleep(0.3)
        server.service.sweep()
        assert client.sessions() == [] and os.listdir(tmp_path / "state") == ["lock"]


def test_metrics_and_health_say_how_it_stands(guarded):
    client, _, _ = guarded
    name = client.create(PROMPT, pace="free")["id"]
    until(lambda: client.session(name)["chunk"] >= 1)
    text = request(client, "GET", "/metrics", AUTH)[1].decode()
    assert 'longtake_sessions{state="running"} 1.0' in text and 'longtake_chunks_total{model="tiny-shapes"}' in text
    assert 'longtake_budget_bytes{device="cpu"} 1e+09' in text
    assert name not in text and TOKENS["ada"] not in text
    assert request(client, "GET", "/healthz")[0] == request(client, "GET", "/readyz")[0] == 200
    client.delete(name)
