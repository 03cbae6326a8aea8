"""Sessions that ask for it are made together, with the results they have by themselves but for rounding."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import longtake
from longtake.policies import parse
from longtake.serve.client import ServerError
from longtake.serve.together import Together
from tests.serving import OTHER, PROMPT, serving, until


def takes(host, age: int) -> list[longtake.Session]:
    """Of different policies, prompts, ages and numbers of streams; of one size."""
    options = [
        ("window:frames=9,sink=3", PROMPT, {}), ("packforcing:sink=1,recent=1,top_k=1", OTHER, {}),
        ("packcache", PROMPT, {"guidance_scale": 3.0}), ("window", OTHER, {"reuse": "flowcache:threshold=0.5"}),
    ]  # fmt: skip
    made = []
    for seed, (policy, prompt, more) in enumerate(options):
        if "reuse" in more:
            more["reuse"] = longtake.reuse.parse(more["reuse"])
        take = longtake.Session(host, parse(policy), prompt=prompt, seed=seed, keep_latents=True, **more)
        for _ in range(age + seed % 2):
            next(take)
        made.append(take)
    made[0].switch(OTHER, "recache" if age else "keep")
    return made


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far, of the largest latent."""
    return float((one - other).abs().max() / one.abs().max())


def seated(take: longtake.Session):
    def make(seat):
        rollout = take.rollout
        own, rollout.host = rollout.host, seat
        try:
            return next(take)
        finally:
            rollout.host = own

    return make


@pytest.mark.parametrize("age", [0, 2])
def test_a_chunk_made_together_with_others_equals_one_made_alone(host, age):
    """From the same past; later ones drift apart with it, as they do for any rounding."""
    alone = [next(take) for take in takes(host, age)]
    together = Together(host)
    made = together.run([seated(take) for take in takes(host, age)])
    for one, other in zip(alone, made, strict=True):
        assert not isinstance(other, BaseException), other
        assert apart(one.latents, other.latents) <= 1e-5
    share = 1 if age else 0.6  # one take recaches its past, alone, and one has a second guidance stream
    assert together.forwards <= share * sum(chunk.stats.forwards for chunk in alone)


def test_a_session_that_fails_leaves_the_others_their_chunk(host):
    good, bad = (longtake.Session(host, prompt=PROMPT, seed=s, keep_latents=True) for s in (1, 2))
    bad.callback_on_step_end = lambda *_: {"latents": torch.zeros(1)}
    alone = next(longtake.Session(host, prompt=PROMPT, seed=1))
    chunk, error = Together(host).run([seated(good), seated(bad)])
    assert isinstance(error, longtake.LongtakeError) and "callback_on_step_end" in str(error)
    assert apart(chunk.latents, alone.latents) <= 1e-5


def test_what_the_model_raises_reaches_every_session(host):
    good, bad = (longtake.Session(host, prompt=PROMPT, seed=s) for s in (1, 2))
    together = Together(host)
    together._answer = lambda calls: 1 / 0  # type: ignore[assignment]
    assert [type(error) for error in together.run([seated(good), seated(bad)])] == [ZeroDivisionError] * 2
    assert good.index == bad.index == 0
    assert next(good).stats.index == 0  # it stands where it stood


def test_a_server_makes_sessions_together_that_ask_for_it_and_no_others(host, tmp_path, monkeypatch):
    rounds, run = [], Together.run

    def counted(self, jobs, threads):
        rounds.append(len(jobs))
        return run(self, jobs, threads)

    monkeypatch.setattr(Together, "run", counted)
    with serving(host, tmp_path / "state") as (client, server):
        options = {"pace": "free", "paused": True, "chunks": 3}
        names = [client.create(PROMPT, seed=s, batch=s < 3, **options)["id"] for s in range(4)]
        assert [client.session(name)["batch"] for name in names] == [True, True, True, False]
        worker, gate = server.service.workers[0], threading.Event()
        worker.call(gate.wait)  # so that all of them are asked to go on before the first does
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.steer, name, type="resume") for name in names]
            until(lambda: len(worker._jobs) == 4)
            gate.set()
            assert [answer.result() for answer in asked] == [{}] * 4
        until(lambda: all(s["state"] == "ended" for s in client.sessions()))
        kept = [server.service.takes[name].session.rollout.kept for name in names]
    assert 2 <= max(rounds) <= 3
    for seed, latents in enumerate(kept):
        take = longtake.Session(host, prompt=PROMPT, seed=seed, keep_latents=True)
        made = [next(take).latents for _ in range(3)]
        for one, other in zip(made, latents.values(), strict=True):
            assert apart(other[0], one) <= 1e-3  # of three chunks, each on top of the last


def test_models_whose_chunks_are_in_flight_together_refuse_it(host, tmp_path):
    other = copy.copy(host)
    other.config = replace(host.config, sampler="staggered")
    with serving(other, tmp_path / "state") as (client, _), pytest.raises(ServerError, match="batch"):
        client.create(PROMPT, batch=True)
