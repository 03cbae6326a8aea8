"""A session's end, what goes on from it, and a history that is made anew while others have their turns."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import longtake
from longtake.serve import take as takes
from longtake.serve.client import ServerError
from longtake.serve.protocol import MAX_CHUNKS
from longtake.session import Session
from tests.serving import OTHER, PROMPT, serving, until

WINDOW = "window:frames=9,sink=3"
STEPS = 1  # of denoising: only what follows from what matters here


def ended(client, **options) -> str:
    """A session that has all its chunks: two, unless told otherwise."""
    options = {"seed": 1, "pace": "free", "chunks": 2, "num_inference_steps": STEPS} | options
    name = client.create(PROMPT, **options)["id"]
    at_end(client, name)
    return name


def at_end(client, name: str) -> dict:
    until(lambda: client.session(name)["state"] != "running")
    session = client.session(name)
    assert (session["state"], session["error"]) == ("ended", None)
    return session


def paused_after(client, chunks: int, **options) -> str:
    """A session that stands still after at least so many chunks."""
    name = client.create(PROMPT, pace="free", num_inference_steps=STEPS, **options)["id"]
    until(lambda: client.session(name)["chunk"] >= chunks)
    client.steer(name, type="pause")
    return name


def latents(server, name: str) -> list[torch.Tensor]:
    logged = server[1].service.takes[name].place.track.chunks()
    return [load_file(logged[index])["latents"] for index in sorted(logged)]


def refusal(call) -> ServerError:
    with pytest.raises(ServerError) as error:
        call()
    return error.value


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [
    {"type": "prompt", "text": OTHER}, {"type": "policy", "policy": WINDOW}, {"type": "record", "on": True},
    {"type": "resume"},
])  # fmt: skip
@pytest.mark.parametrize("parked", [False, True])
def test_an_ended_session_refuses_what_could_only_show_in_a_next_chunk(client, server, action, parked):
    name = ended(client)
    if parked:
        client.park(name)
    before = client.session(name)
    error = refusal(lambda: client.steer(name, **action))
    assert (error.status, error.problem["code"]) == (409, "ended")
    assert "all its 2 chunks are made" in str(error) and "fork it, create a new session" in str(error)
    assert "\n" not in str(error)
    assert client.session(name) == before  # not even woken
    assert [m.what for m in server[1].service.takes[name].timeline] == ["begin"]


def test_the_socket_of_a_viewer_tells_the_same(client):
    name = ended(client)
    with client.watch(name) as stream:
        number = stream.steer(type="prompt", text=OTHER)
        answer = next(item for item in stream if isinstance(item, dict) and item["type"] == "error")
    assert answer["id"] == number and answer["error"]["code"] == "ended"


def test_a_recording_can_be_closed_and_a_snapshot_kept_after_the_end(client):
    name = ended(client, record=True)
    client.steer(name, type="record", on=False)
    assert client.session(name)["recorded_frames"] == 9 + 12
    client.steer(name, type="save")


def test_going_back_from_the_end_opens_it_again_and_going_there_ends_it(client, server):
    name = client.create(PROMPT, seed=2, pace="free", chunks=2, num_inference_steps=STEPS, paused=True)["id"]
    begin = client.steer(name, type="save")["snapshot"]["id"]
    client.steer(name, type="resume")
    at_end(client, name)
    end = client.steer(name, type="save")["snapshot"]["id"]
    client.steer(name, type="seek", snapshot=begin)
    assert client.session(name)["state"] == "paused"
    client.steer(name, type="prompt", text=OTHER)
    client.steer(name, type="seek", snapshot=end)
    assert client.session(name)["state"] == "ended"
    assert refusal(lambda: client.steer(name, type="resume")).status == 409
    assert len(latents(server, name)) == 2


def test_a_session_killed_between_its_last_chunk_and_the_word_of_it_has_ended(client, server):
    name = ended(client)
    client.park(name)
    take = server[1].service.takes[name]
    take.wanted = "running"  # what its description said before
    take.place.write(wanted="running")
    assert refusal(lambda: client.steer(name, type="resume")).problem["code"] == "ended"
    assert client.session(name)["state"] == "ended" and len(latents(server, name)) == 2


# --- what goes on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [WINDOW, "full"])
def test_a_fork_of_an_ended_session_has_as_many_chunks_to_come_or_as_many_as_it_asks_for(client, server, host, policy):
    """… which are those of a take that did not end there, also where the history was as long as the first take."""
    name = ended(client, policy=policy)
    child, short = client.fork(name)["id"], client.fork(name, chunks=1)["id"]
    assert (at_end(client, child)["chunks"], at_end(client, short)["chunks"]) == (4, 3)
    again = client.fork(child)["id"]
    assert at_end(client, again)["chunks"] == 4 + 2  # as many as it was to have, not as it has with its parent's
    assert client.fork(name, paused=True)["state"] == "paused"
    whole = longtake.Session(
        host, longtake.policies.parse(policy), prompt=PROMPT, seed=1, num_inference_steps=STEPS, chunks=6
    )
    made = latents(server, again)
    assert len(made) == 6
    assert all(torch.equal(next(whole).latents, one[0]) for one in made)
    assert torch.equal(latents(server, short)[2], made[2]) and client.session(name)["chunk"] == 2


def test_a_fork_in_the_middle_counts_from_there_and_an_endless_one_stays_endless(client):
    name = client.create(PROMPT, pace="free", chunks=9, num_inference_steps=STEPS, paused=True)["id"]
    saved = client.steer(name, type="save")["snapshot"]["id"]
    assert client.fork(name, snapshot=saved, paused=True)["chunks"] == 9
    assert client.fork(name, chunks=3, paused=True)["chunks"] == 3
    endless = paused_after(client, 2)
    at = client.session(endless)["chunk"]
    assert client.fork(endless, paused=True)["chunks"] is None
    child = client.fork(endless, paused=True, chunks=5, prompt=OTHER)
    assert (child["chunks"], child["prompt"]) == (at + 5, OTHER)
    error = refusal(lambda: client.fork(endless, chunks=MAX_CHUNKS))
    assert error.status == 422 and "ask for less" in str(error)
    fork = client._json("GET", "/v1/openapi.json")["components"]["schemas"]["Fork"]["properties"]["chunks"]
    assert "as many as the original" in fork["description"]


# --- a history made anew --------------------------------------------------------------------------------------------


@pytest.fixture
def turns(monkeypatch):
    """What the device's thread does, in order: `chunk`, or `commit` of a logged one; and what is done before one."""
    done: list[str] = []
    before: list = []
    make, extend = takes.Take.make, Session.extend

    def chunk(self, seat=None):
        done.append("chunk")
        return make(self, seat)

    def commit(self, given):
        for call in before:
            call(done.count("commit"))
        done.append("commit")
        return extend(self, given)

    monkeypatch.setattr(takes.Take, "make", chunk)
    monkeypatch.setattr(Session, "extend", commit)
    return done, before


def test_a_change_of_policy_lets_every_other_session_have_its_chunk_between_two_commits(client, turns):
    name = paused_after(client, 4)
    others = [client.create(PROMPT, seed=s, pace="free", num_inference_steps=STEPS)["id"] for s in (1, 2)]
    until(lambda: all(client.session(other)["chunk"] for other in others))
    done, _ = turns
    done.clear()
    answer = client.steer(name, type="policy", policy=WINDOW)
    assert answer["chunk"] == done.count("commit") >= 4
    first = done.index("commit")
    between = " ".join(done[first:]).split("commit")[1:-1]
    assert [turn.count("chunk") for turn in between] == [len(others)] * (answer["chunk"] - 1)


def test_what_is_asked_of_the_session_meanwhile_waits_and_is_then_done(client, server, turns):
    name = paused_after(client, 3)
    worker = server[1].service.workers[0]
    asked = threading.Event()

    def ask(commits: int) -> None:
        if commits == 1:  # one is made, two are not
            asked.set()
            until(lambda: len(worker._jobs) == 2)
            told.append(client.session(name)["state"])

    told: list[str] = []
    turns[1].append(ask)
    with ThreadPoolExecutor(3) as pool:
        policy = pool.submit(client.steer, name, type="policy", policy=WINDOW)
        assert asked.wait(60)
        prompt = pool.submit(client.steer, name, type="prompt", text=OTHER, mode="cut")
        copy = pool.submit(client.fork, name, paused=True)
        assert policy.result()["policy"].startswith(WINDOW) and prompt.result()["mode"] == "cut"
        assert copy.result()["policy"] == policy.result()["policy"]
    assert told == ["paused"]  # not parked: it is at work
    moments = server[1].service.takes[name].timeline
    assert [moment.what for moment in moments] == ["begin", "policy", "prompt"]
    at = client.session(name)["chunk"]
    client.steer(name, type="resume")
    until(lambda: client.session(name)["chunk"] > at)


def test_a_server_killed_meanwhile_comes_back_under_the_policy_before(client, server, host, turns, tmp_path):
    name = paused_after(client, 3, seed=6)
    before = client.session(name)
    state = server[1].service.settings.state
    turns[1].append(lambda commits: commits == 2 and shutil.copytree(state, tmp_path / "state"))
    client.steer(name, type="policy", policy=WINDOW)
    turns[1].clear()
    with serving(host, tmp_path / "state") as (again, other):
        assert again.session(name)["chunk"] == before["chunk"]
        again.steer(name, type="resume")
        until(lambda: again.session(name)["chunk"] >= before["chunk"] + 2)
        again.steer(name, type="pause")
        assert again.session(name)["policy"] == before["policy"]
        made = latents((again, other), name)
    take = longtake.Session(host, prompt=PROMPT, seed=6, num_inference_steps=STEPS)
    assert all(torch.equal(next(take).latents, one[0]) for one in made)


def test_a_change_that_fails_on_its_way_changes_nothing(client, server, host, turns):
    name = paused_after(client, 3, seed=7)
    before, ledger = client.session(name), server[1].service.workers[0].ledger

    def fail(commits: int) -> None:
        if commits == 2:
            raise longtake.LongtakeError("the third chunk is not to be had")

    turns[1].append(fail)
    assert "third chunk" in str(refusal(lambda: client.steer(name, type="policy", policy=WINDOW)))
    turns[1].clear()
    session = client.session(name)
    assert (session["policy"], session["state"]) == (before["policy"], "paused")
    assert ledger.of(name) == before["reserved_bytes"]
    client.steer(name, type="resume")
    until(lambda: client.session(name)["chunk"] >= before["chunk"] + 2)
    client.steer(name, type="pause")
    take = longtake.Session(host, prompt=PROMPT, seed=7, num_inference_steps=STEPS)
    assert all(torch.equal(next(take).latents, one[0]) for one in latents(server, name))


def test_a_server_that_is_told_to_end_finishes_the_change_it_has_begun(host, turns, tmp_path):
    done, before = turns
    with ThreadPoolExecutor(2) as pool, serving(host, tmp_path / "state") as (client, server):
        name = paused_after(client, 3, seed=8)
        worker, begun = server.service.workers[0], threading.Event()
        before.append(lambda commits: begun.set())
        before.append(lambda commits: commits == 1 and until(lambda: worker._closing))
        change = pool.submit(client.steer, name, type="policy", policy=WINDOW)
        assert begun.wait(60)
        pool.submit(worker.close).result(60)
        assert change.result()["chunk"] == done.count("commit") >= 3
    assert server.service.takes[name].place.manifest["policy"].startswith(WINDOW)
    assert server.service.takes[name].state == "parked"
