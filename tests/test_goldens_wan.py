"""Rollouts of the original authors' modules on the stock diffusers classes: 1e-4 at every chunk, no growth."""

import pytest
import torch

from longtake import FullHistory, Session, SlidingWindow
from longtake.samplers import ChunkedSampler, Schedule, default_sampler

from .tiny import Replay, golden, self_forcing_host

CASES = {
    "self_forcing_rollout_global": FullHistory(),
    "self_forcing_rollout_window9_sink3": SlidingWindow(9, sink=3),
    "infinity_rope_window6": SlidingWindow(6, sink=1, positions="slots"),
    "longlive_relative_rope": SlidingWindow(9, sink=3, positions="slots"),
}


def rollout(name: str, policy, residency: str = "resident", **changes):
    tensors, meta = golden(name)
    host = self_forcing_host(tensors, meta["config"])
    noise = Replay(tensors["inputs/noise"], tensors["inputs/fresh_noise"], meta["config"]["chunk_frames"])
    take = Session(
        host,
        policy,
        prompt_embeds=tensors["inputs/text_embeds"],
        noise=noise,
        decode=False,
        residency=residency,
        **changes,
    )
    expected = tensors["outputs/x0"]  # [chunk, B, f, C, h, w]
    errors = [float((next(take).latents - x0[0].transpose(0, 1)).abs().max()) for x0 in expected]
    return errors, take, tensors, meta


# what moves tokens cannot be shown where it lies
RUNS = [
    (name, residency)
    for name, policy in CASES.items()
    for residency in ("resident", "scratch", "alias")
    if residency != "alias" or getattr(policy, "positions", "absolute") == "absolute"
]


@pytest.mark.parametrize(("name", "residency"), RUNS)
def test_rollout_matches_the_original_at_every_chunk(name, residency):
    errors, *_ = rollout(name, CASES[name], residency)
    assert max(errors) < 1e-4
    assert max(errors[-2:]) < 4 * max(max(errors[:2]), 1e-6), errors


def test_first_velocity_matches_the_original():
    tensors, meta = golden("self_forcing_rollout_global")
    seen = []
    host = self_forcing_host(tensors, meta["config"])
    forward = host.forward
    host.forward = lambda *a: seen.append(forward(*a)) or seen[-1]
    noise = Replay(tensors["inputs/noise"], tensors["inputs/fresh_noise"], 3)
    next(Session(host, FullHistory(), prompt_embeds=tensors["inputs/text_embeds"], noise=noise, decode=False))
    assert torch.allclose(seen[0].transpose(1, 2), tensors["outputs/first_velocity"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["self_forcing_rollout_global", "self_forcing_rollout_window9_sink3"])
def test_history_holds_the_originals_cache(name):
    """Un-rotated rows, rotated where they stand, are the published cache (which holds rotated keys)."""
    _, take, tensors, _ = rollout(name, CASES[name])
    store = take.history.stores["cond"]
    for layer, label in ((0, "layer0"), (-1, "last_layer")):
        rows = torch.cat([store.held[(b.id, "full")].rows for b in take.history.table().blocks])
        k = take.history.rotary.rotate(store.k[layer][:, rows], take.history.rotary.phases(store.base[rows]))
        cached = tensors[f"outputs/cache_{label}_k"]
        assert torch.allclose(k[:, -cached.shape[1] :], cached, atol=1e-4, rtol=0)
        assert torch.allclose(store.v[layer][:, rows], tensors[f"outputs/cache_{label}_v"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "policy", "least"),
    [
        ("self_forcing_rollout_window9_sink3", SlidingWindow(9, sink=0), 1e-2),
        ("infinity_rope_window6", SlidingWindow(6, sink=1), 1e-2),
        ("self_forcing_rollout_global", SlidingWindow(9, sink=3), 1e-2),
    ],
)
def test_another_policy_would_be_noticed(name, policy, least):
    errors, *_ = rollout(name, policy)
    assert max(errors) > least


def test_whole_timesteps_would_be_noticed():
    tensors, meta = golden("self_forcing_rollout_global")
    host = self_forcing_host(tensors, meta["config"])
    noise = Replay(tensors["inputs/noise"], tensors["inputs/fresh_noise"], 3)
    own = default_sampler(host.config).schedule
    whole = ChunkedSampler(Schedule(tuple(float(int(t)) for t in own.timesteps)))
    given = {"prompt_embeds": tensors["inputs/text_embeds"], "noise": noise, "decode": False}
    take = Session(host, FullHistory(), sampler=whole, **given)
    assert float((next(take).latents - tensors["outputs/x0"][0][0].transpose(0, 1)).abs().max()) > 1e-2
