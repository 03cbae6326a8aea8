"""What a session will hold is known before it exists, and a server never promises more bytes than it has."""

from __future__ import annotations

import pytest
import torch

import longtake
from longtake.policies import available, parse
from longtake.serve.admission import Constants, Ledger, fitting, footprint, measure, shape_of
from longtake.serve.client import ServerError
from longtake.serve.errors import NoRoom
from longtake.serve.naming import reuse_named
from tests.serving import OTHER, PROMPT, serving, until
from tests.skyreels import tiny_skyreels


@pytest.fixture(scope="module")
def constants(host):
    return measure(host)


ENDS = "packforcing:sink=1,recent=1,top_k=2,archive=6"
PACKFORCING = [ENDS, f"{ENDS},layers=shared", f"{ENDS},middle=full", f"{ENDS},layers=shared,offload=true"]
POLICIES = [*sorted(set(available()) - {"packforcing"}), "window:frames=9,sink=3", *PACKFORCING]
CHUNKS = 11  # by then every one of them is full


RESIDENT, SCRATCH = (64, 1.0, "resident", True), (96, 3.0, "scratch", False)  # size, guidance, view, latents kept
CASES = [(p, RESIDENT) for p in POLICIES] + [(p, SCRATCH) for p in ("window", "flowcache", ENDS)]


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_measured_bytes_equal_the_arithmetic_within_five_percent(host, constants, policy, options):
    """… for every policy that there is, after every chunk from when it is full."""
    size, guidance, residency, keeps = options
    method, geometry = parse(policy), host.geometry(size, size)
    chunks = CHUNKS if policy == "full" else None
    shape = shape_of(host, geometry, constants, guidance, 1, chunks)
    need = footprint(host, geometry, method.settle(shape), shape, constants, keeps, residency)
    take = longtake.Session(
        host, method, prompt=PROMPT, height=size, width=size, guidance_scale=guidance, num_inference_steps=1,
        residency=residency, keep_latents=keeps, chunks=chunks,
    )  # fmt: skip
    for made in range(CHUNKS):
        next(take)
        held = take.memory()
        assert held["total"] <= 1.05 * need.total, (need, held)
        if made >= CHUNKS - 3:
            assert need.total <= 1.05 * held["total"], (need, held)
    assert need.store == pytest.approx(held["store"], rel=0.1) and need.decoder == held["decoder"]
    assert need.compressor == pytest.approx(held["compressor"], rel=0.05)


@pytest.mark.parametrize("reuse", [None, "flowcache:threshold=0.5"])
def test_chunks_in_flight_and_what_reuse_remembers_of_them_are_counted(reuse):
    host = tiny_skyreels()
    words, reusing = torch.zeros(1, 7, 10), reuse_named(reuse)
    constants = Constants(host.text_state(words).nbytes, 0, 0.0)
    take = longtake.Session(
        host, longtake.SlidingWindow(25, 5), reuse=reusing, prompt_embeds=words, negative_prompt_embeds=words,
        decode=False,
    )  # fmt: skip
    geometry = host.geometry()
    shape = shape_of(host, geometry, constants, None, None, None)
    need = footprint(host, geometry, longtake.SlidingWindow(25, 5), shape, constants, False, "resident", reusing)
    for _ in range(6):
        next(take)
        held = take.memory()
        assert held["total"] <= 1.05 * need.total, (need, held)
    assert need.total <= 1.05 * held["total"], (need, held)
    assert (need.reuse > 0) == (held["reuse"] > 0) == (reuse is not None)


def test_full_history_of_a_known_length_is_counted_and_an_endless_one_refused(host):
    geometry, constants = host.geometry(), measure(host)
    with pytest.raises(longtake.LongtakeError, match="grows with the take"):
        shape = shape_of(host, geometry, constants, None, None, None)
        footprint(host, geometry, longtake.FullHistory(), shape, constants, False)
    shape = shape_of(host, geometry, constants, None, None, 10)
    need = footprint(host, geometry, longtake.FullHistory(), shape, constants, False)
    assert need.store == longtake.Session(host, longtake.FullHistory(), prompt=PROMPT, chunks=10).memory()["store"]


def test_what_would_fit_fits_and_nothing_larger_of_its_kind_does(host):
    geometry, constants = host.geometry(), measure(host)
    shape = shape_of(host, geometry, constants, None, None, None)
    whole = footprint(host, geometry, longtake.SlidingWindow(), shape, constants, True).total
    found = fitting(host, geometry, longtake.SlidingWindow(), shape, constants, True, whole // 2)
    assert found is not None and found.bytes <= whole // 2
    assert footprint(host, geometry, parse(found.policy), shape, constants, True).total == found.bytes
    assert fitting(host, geometry, longtake.SlidingWindow(), shape, constants, True, 1000) is None


def test_a_ledger_never_promises_more_than_it_has():
    ledger = Ledger(100)
    ledger.reserve("a", 60)
    with pytest.raises(NoRoom):
        ledger.reserve("b", 41)
    ledger.reserve("b", 40)
    ledger.reserve("a", 60)  # again: its own share counts as free to it
    with pytest.raises(NoRoom):
        ledger.reserve("a", 61)
    ledger.release("b")
    assert ledger.free == 40


def test_a_session_that_does_not_fit_gets_503_and_what_would(host, tmp_path):
    with serving(host, tmp_path / "state", memory=12_000_000) as (client, server):
        with pytest.raises(ServerError) as refusal:
            for seed in range(8):
                watched = client.create(PROMPT, seed=seed, pace="free")  # running ones are not sent to disk
        problem = refusal.value.problem
        assert refusal.value.status == 503 and problem["code"] == "no_room"
        assert problem["needed_bytes"] > problem["free_bytes"] >= 0
        if fits := problem.get("fits"):
            accepted = client.create(PROMPT, policy=fits["policy"])
            assert accepted["reserved_bytes"] == fits["bytes"] <= problem["free_bytes"]
        ledger = server.service.workers[0].ledger
        assert ledger.reserved <= ledger.budget
        until(lambda: client.session(watched["id"])["chunk"] >= 8)  # its window is full then
        assert watched["reserved_bytes"] == pytest.approx(client.session(watched["id"])["held_bytes"], rel=0.05)


def test_sessions_nobody_needs_go_to_disk_for_one_that_does_not_fit(host, tmp_path):
    with serving(host, tmp_path / "state", memory=12_000_000) as (client, server):
        names = [client.create(PROMPT, seed=seed, paused=True)["id"] for seed in range(8)]
        states = [client.session(name)["state"] for name in names]
        assert states[0] == "parked" and states[-1] == "paused"
        assert client.steer(names[0], type="prompt", text=OTHER, mode="keep")["mode"] == "keep"  # it comes back
        assert client.session(names[0])["state"] == "paused"
        assert server.service.workers[0].ledger.reserved <= 12_000_000


def test_reserved_bytes_equal_held_ones_once_a_session_is_full(host, tmp_path):
    with serving(host, tmp_path / "state") as (client, _):
        session = client.create(PROMPT, pace="free", policy="window:frames=9,sink=3", chunks=6)
        until(lambda: client.session(session["id"])["state"] == "ended")
        info = client.session(session["id"])
        assert info["held_bytes"] == pytest.approx(info["reserved_bytes"], rel=0.05), info["memory"]
