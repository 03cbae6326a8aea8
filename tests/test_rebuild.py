"""Prompt recache: K/V of the past rewritten from its latents."""

import pytest
import torch

from longtake import FullHistory, LongtakeError, Session, SlidingWindow

from .tiny import text, tiny_wan

POLICIES = [FullHistory(), SlidingWindow(9, 3), SlidingWindow(9, 3, positions="slots")]


def take(policy, chunks=5, residency="resident", **options):
    session = Session(
        tiny_wan(guidance=2.0), policy, prompt_embeds=text(), negative_prompt_embeds=text(seed=9), decode=False,
        keep_latents=True, residency=residency, **options,
    )  # fmt: skip
    latents = [next(session).latents for _ in range(chunks)]
    return session, latents


def rows(session):
    return [(s.k.clone(), s.v.clone()) for s in session.history.stores.values()]


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_under_the_same_prompt_and_with_all_its_past_nothing_changes(policy, residency):
    session, _ = take(policy, chunks=2, residency=residency)
    before = rows(session)
    assert session.rebuild() == 2
    for (k, v), (k2, v2) in zip(before, rows(session), strict=True):
        assert torch.equal(k, k2) and torch.equal(v, v2)


def test_recache_equals_a_cache_built_from_the_latents_under_the_new_prompt():
    session, latents = take(FullHistory())
    session.set_prompt_embeds(text(seed=5))
    assert session.rebuild() == 5

    other = Session(
        tiny_wan(guidance=2.0), FullHistory(), prompt_embeds=text(seed=5), negative_prompt_embeds=text(seed=9),
        decode=False, callback_on_step_end=lambda s, step, t, kw: {"latents": latents[s.index][None]},
    )  # fmt: skip
    for _ in latents:
        next(other)
    for s in session.history.streams:
        ours, theirs = session.history.stores[s], other.history.stores[s]
        used = ours.used.nonzero()[:, 0]
        assert torch.allclose(ours.k[:, :, used], theirs.k[:, :, used], atol=1e-5)
        assert torch.allclose(ours.v[:, :, used], theirs.v[:, :, used], atol=1e-5)


def test_the_take_goes_on_and_the_new_prompt_is_in_its_past():
    kept, _ = take(SlidingWindow(9, 3))
    rebuilt, _ = take(SlidingWindow(9, 3))
    for session in (kept, rebuilt):
        session.set_prompt_embeds(text(seed=5))
    assert rebuilt.rebuild() == 3  # what the window holds
    a, b = next(kept).latents, next(rebuilt).latents
    assert (a - b).abs().max() > 1e-3
    assert rebuilt.stats.chunks == 6 and rebuilt.history.frames_seen == 18


def test_latents_are_bounded_counted_and_survive_a_snapshot(tmp_path):
    session, _ = take(SlidingWindow(9, 3), chunks=8)
    assert len(session.rollout.kept) <= 4
    assert session.memory()["latents"] == sum(x.nbytes for x in session.rollout.kept.values()) > 0
    session.snapshot(tmp_path / "a.safetensors")
    again = Session.restore(tmp_path / "a.safetensors", session.host)
    for s in (session, again):
        s.set_prompt_embeds(text(seed=5))
        s.rebuild()
    assert torch.equal(next(session).latents, next(again).latents)


def test_without_latents_it_says_what_to_do():
    session = Session(tiny_wan(), FullHistory(), prompt_embeds=text(), decode=False)
    with pytest.raises(LongtakeError, match="keep_latents=True"):
        session.rebuild()
