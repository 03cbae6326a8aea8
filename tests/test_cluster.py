"""Takes on a Ray cluster, on loopback: made once each though workers are killed, and live ones come back bit-exact.

One cluster for the whole file, with two CPUs: a test that needs more processes is in the wrong place.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

import longtake
from longtake.cli import app
from longtake.cluster import batch as batches
from longtake.cluster.connecting import LOOPBACK, connected, slots
from longtake.cluster.farm import Farm
from longtake.cluster.front import Front
from longtake.cluster.jobs import read_lines
from longtake.cluster.making import RECORD, VIDEO, Maker
from longtake.serve.access import Tokens
from longtake.serve.client import Client, ServerError
from longtake.serve.protocol import NewSession
from longtake.serve.server import Server, service_of
from longtake.serve.settings import Settings
from tests.serving import OTHER, PROMPT, collect, decoded, until
from tests.test_batch import BALL, inodes, write
from tests.test_serve_faults import logged


@pytest.fixture(scope="module")
def ray():
    with connected(cpus=2, store_bytes=80 * 2**20) as ray:
        yield ray


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def working(title: str) -> list[psutil.Process]:
    """Workers of this cluster that run a method of that title now."""
    found = []
    for process in descendants():
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_one(title: str) -> None:
    until(lambda: working(title), 120)
    working(title)[0].send_signal(signal.SIGKILL)


def hashes(out: Path) -> dict[str, tuple[str, str]]:
    records = [json.loads(path.read_text()) for path in out.glob(f"takes/*/{RECORD}")]
    return {record["digest"]: (record["latents_sha256"], record["video_sha256"]) for record in records}


def test_nothing_of_a_cluster_of_our_own_listens_beyond_loopback(ray):
    places = set()
    for process in [psutil.Process(), *descendants()]:
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                places.add(connection.laddr.ip.removeprefix("::ffff:"))
    assert places == {LOOPBACK}
    assert not ray.worker.get_dashboard_url()


def test_a_batch_whose_worker_is_killed_makes_every_line_once(ray, tmp_path):
    """… and each as one process alone makes it, bit for bit."""
    file = write(tmp_path / "p.jsonl", *(BALL | {"seed": seed, "chunks": 6} for seed in range(5)), {"prompt": ""})
    lines = read_lines(file, {})
    killed = threading.Thread(target=lambda: kill_one("ray::Maker.answer"))
    killed.start()
    farm = Farm(ray, *slots(ray, 2, "cpu", None), {"device": "cpu"})
    outcomes = batches.run(lines, tmp_path / "out", farm, lambda: True, lambda outcome: None)
    killed.join()
    assert [outcome.status for outcome in outcomes] == ["made"] * 5 + ["wrong"]
    assert sorted(outcome.attempts for outcome in outcomes) == [1] * 5 + [2]
    here = batches.Here(Maker("cpu"))
    assert {o.status for o in batches.run(lines[2:5], tmp_path / "alone", here, lambda: True, print)} == {"made"}
    assert hashes(tmp_path / "alone").items() <= hashes(tmp_path / "out").items()
    assert len(hashes(tmp_path / "out")) == 5 and len(inodes(tmp_path / "out")) == 10


def test_a_killed_driver_loses_what_was_in_flight_and_nothing_is_made_twice(ray, tmp_path):
    out, file = tmp_path / "out", tmp_path / "p.jsonl"
    write(file, BALL | {"seed": 1}, BALL | {"seed": 2, "chunks": 10**6})
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "longtake", "batch", str(file), "-o", str(out), "--device", "cpu"]
    command += ["--ray-address", address, "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as driver:
        until(lambda: driver.poll() is not None or len(list(out.glob("takes/*"))) == 1, 120)
        driver.send_signal(signal.SIGKILL)
    before = inodes(out)
    assert len(before) == 2
    lines = read_lines(write(file, BALL | {"seed": 1}, BALL | {"seed": 2}), {})
    outcomes = batches.run(lines, out, batches.Here(Maker("cpu")), lambda: True, print)
    assert [outcome.status for outcome in outcomes] == ["kept", "made"]
    assert before.items() <= inodes(out).items() and len(inodes(out)) == 4
    until(lambda: not working("ray::Maker"))  # Ray ends the workers of a driver that is gone


def test_a_comparison_whose_worker_is_killed_makes_every_cell_once(ray, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, "-m", "longtake", "compare", "-o", str(out), "-p", "window", "--prompt", PROMPT]
    line += [
        "--chunks",
        "2",
        "--seeds",
        "4",
        "--reuse",
        "none",
        "--reuse",
        "flowcache:slow",
        "--device",
        "cpu",
        "--json",
    ]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*line, "--ray-address", address, "--workers", "1"], env=environment) as driver:
        kill_one("ray::Worker.do")
        assert driver.wait(300) == 0
    answer = json.loads((out / "summary.json").read_text())
    assert answer["finished"] == answer["cells"] == 8 and answer["notes"] == []
    cells = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert len(cells) == 8 and not list((out / "cells").glob(".*")), "nothing half-made is left"
    assert subprocess.run(line, env=environment, timeout=300).returncode == 0
    assert cells == {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}, "and none made again"


def test_a_worker_that_shares_no_disk_sends_its_take(tmp_path):
    job = read_lines(write(tmp_path / "p.jsonl", BALL), {})[0].job
    maker = Maker("cpu")
    told = maker.answer(job, tmp_path / "nowhere", "token", tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "token").write_text("token")
    shared = maker.answer(job, tmp_path / "here", "token", tmp_path)
    assert shared["video"] is None and (tmp_path / "here" / VIDEO).read_bytes() == told["video"]
    assert shared["record"]["latents_sha256"] == told["record"]["latents_sha256"]
    assert "problem" in maker.answer(replace(job, model="no-model"), tmp_path, "token", tmp_path)


def test_without_ray_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (["batch", str(write(tmp_path / "p.jsonl", BALL)), "-o", str(tmp_path / "out")], ["serve"]):
        done = CliRunner().invoke(app, [*command, "--ray"])
        assert done.exit_code == 2 and "pip install 'longtake[cluster]'" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


# --- live -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    return longtake.load("tiny-wan", device="cpu")


@pytest.fixture(scope="module")
def need(host, tmp_path_factory) -> int:
    """Bytes of one session of the default kind."""
    service = service_of([{"tiny-wan": host}], Settings(state=tmp_path_factory.mktemp("one") / "state"), 10**9)
    info = asyncio.run(service.create("", NewSession(prompt=PROMPT, paused=True)))
    service.close()
    return info.reserved_bytes


@pytest.fixture(scope="module")
def fleet(ray, need, tmp_path_factory):
    """A server with two workers, each with room for one session and a half."""
    state = tmp_path_factory.mktemp("fleet") / "state"
    settings = Settings(state=state, creations_per_minute=10**6, snapshot_every=4)
    front = Front(ray, 2, {"num_cpus": 1.0}, {"tiny-wan": "tiny-wan"}, settings, need * 3 // 2, "cpu", None, 1)
    server = Server(front, Tokens(None), port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    yield Client(f"http://127.0.0.1:{server.address[1]}", timeout=300), front
    server.stop()
    thread.join(120)
    assert not thread.is_alive()
    told = [json.loads(path.read_text()) for path in state.glob("worker-*/*/session.json")]
    assert [session["awake"] for session in told] == [False]  # the last test's, parked in order


def test_a_session_survives_a_kill_of_its_worker_bit_exactly(fleet, host):
    """… without being asked: it goes on where its log ends, while the other worker's session knows nothing of it."""
    client, front = fleet
    name = client.create(PROMPT, seed=3, pace="free")["id"]
    other = client.create(PROMPT, seed=4, paused=True)["id"]
    worker, quiet = front._homes[name][0], front._homes[other][0]
    assert worker is not quiet
    pid, kept = worker.status.place["pid"], quiet.status.place["pid"]
    until(lambda: client.session(name)["chunk"] >= 5)
    with client.watch(name) as stream:
        switched = client.steer(name, type="prompt", text=OTHER, mode="recache")["chunk"]
        until(lambda: client.session(name)["chunk"] > switched)
        seen = client.session(name)["chunk"]
        os.kill(pid, signal.SIGKILL)
        assert [item for item in stream if isinstance(item, dict)][-1]["type"] == "bye"
    assert client.session(other)["state"] == "paused"
    assert name in {session["id"] for session in client.sessions()}
    until(lambda: worker.up and worker.status.place["pid"] != pid, 300)
    assert client.session(name)["chunk"] >= seen
    until(lambda: client.session(name)["chunk"] >= seen + 4, 120)
    client.steer(name, type="pause")
    recovery = client.session(name)["recovery"]
    assert recovery["snapshot_chunk"] + recovery["replayed_chunks"] >= seen
    assert quiet.status.place["pid"] == kept
    made = logged(front.settings.state / f"worker-{worker.number:03d}", name)
    take = longtake.Session(host, prompt=PROMPT, seed=3, keep_latents=True)
    for index in range(seen + 4):
        if index == switched:
            take.switch(OTHER, "recache")
        assert torch.equal(next(take).latents, made[index][0]), index
    for session in (name, other):
        client.delete(session)


def test_placement_is_by_bytes_and_refuses_what_does_not_fit(fleet, need):
    client, front = fleet
    until(lambda: all(w.up and w.status.free == need * 3 // 2 for w in front._workers), 120)
    names = [client.create(PROMPT, seed=seed)["id"] for seed in range(2)]
    assert {front._homes[name][0].number for name in names} == {0, 1}
    with pytest.raises(ServerError) as refused:
        client.create(PROMPT, seed=9)
    assert refused.value.status == 503 and refused.value.problem["code"] == "no_room"
    assert refused.value.problem["needed_bytes"] > refused.value.problem["free_bytes"]
    client.delete(names[0])
    third = client.create(PROMPT, seed=9)
    names[0] = third["id"]
    assert third["reserved_bytes"] == need and len(client.sessions()) == 2
    with client.watch(names[0]) as stream:
        _, parts = collect(stream, 12)
    assert len(decoded(b"".join(parts))) == 12
    for name in names:
        client.delete(name)
    assert client.sessions() == []
    with pytest.raises(ServerError, match="no such session"):
        client.session(names[0])


def test_figures_of_all_workers_are_on_one_page(fleet):
    client, _ = fleet
    client.create(PROMPT, seed=5, paused=True)
    with client._call("GET", "/metrics") as answer:
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    workers = [sample.labels.get("worker") for sample in families["longtake_budget_bytes"].samples]
    assert sorted(workers) == ["0", "1"]


def test_workers_that_no_machine_has_the_bytes_for_are_refused(ray, tmp_path):
    with pytest.raises(longtake.LongtakeError, match="do not fit"):
        Front(ray, 2, {"num_cpus": 1.0}, {"tiny-wan": "tiny-wan"}, Settings(state=tmp_path / "s"), 10**15, "cpu")
    with pytest.raises(longtake.LongtakeError, match="room for 2"):
        slots(ray, 3, "cpu", None)
