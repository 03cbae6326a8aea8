"""The masked sampler: how many codes a step leaves, how they are ranked and drawn, and what later frames see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longtake import FullHistory, LongtakeError, NonFiniteError, ReusePolicy, Session
from longtake.hosts.lumos.sequence import FIXED, MASKED
from longtake.samplers import masked
from longtake.samplers.masked import CodeNoise, MaskedSampler, history_pattern, still_masked

from .lumos import CONFIG, GEOMETRY, LOOP, Fed, tiny_lumos


def take(host=None, *, chunks=None, **options) -> Session:
    return Session(
        host or tiny_lumos(codec=False), FullHistory(), prompt=options.pop("prompt", "red kite"), chunks=chunks,
        decode=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_masked_counts_follow_the_cosine(compat):
    session = take(sampler=MaskedSampler(6, compat=compat))
    fed = Fed(session.host)
    next(session)
    cells = session.geometry.codes
    expected = [cells, *(still_masked(cells, s, 6) for s in range(5))]
    assert [int((x == MASKED).sum()) for x in fed.content[:12:2]] == expected


def test_the_published_counts_of_sixty_four_codes():
    assert [still_masked(64, s, 6) for s in range(5)] == [61, 55, 45, 31, 16]
    assert still_masked(96, 1, 3) == 47  # fp64 would say 48
    assert [still_masked(4032, s, 50) for s in (0, 1, 9, 24, 39, 48)] == [4030, 4024, 3834, 2851, 1245, 126]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_published_temperature_falls_for_ever(task):
    sampler = MaskedSampler(CONFIG["steps"], compat="upstream")
    frames = len(LOOP["argmax"][task]["frames"])
    ours = [sampler.ranking_temperature(f, s) for f in range(frames) for s in range(CONFIG["steps"])]
    assert ours == pytest.approx(LOOP["argmax"][task]["temperatures"], abs=1e-15)


def test_the_mended_temperature_starts_anew_in_every_frame():
    sampler = MaskedSampler(4, temperature=2.0)
    assert [sampler.ranking_temperature(f, s) for f in (0, 7) for s in range(4)] == [1.5, 1.0, 0.5, 0.0] * 2


def codes():
    return torch.arange(GEOMETRY.codes).view(1, 1, 1, *GEOMETRY.latent_size)


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_a_committed_frame_is_masked_evenly_newlines_too(compat):
    fed, _ = MaskedSampler(compat=compat).commit_input(codes(), GEOMETRY, "cond")
    hidden = fed.flatten() == MASKED
    assert hidden.nonzero()[:, 0].tolist() == history_pattern(fed.numel(), 0.7).tolist()
    assert bool(hidden.view(GEOMETRY.grid)[:, -1].any())  # some newlines
    seen = fed[..., :-1][fed[..., :-1] != MASKED]
    assert torch.equal(seen, codes()[fed[..., :-1] != MASKED])


def test_a_given_image_is_whole_in_the_published_program_and_masked_like_any_history_in_the_mended_one():
    upstream, fixed = (
        {stream: MaskedSampler(compat=compat).commit_input(codes(), GEOMETRY, stream, given=True)[0]
         for stream in ("cond", "uncond")}
        for compat in ("upstream", "fixed")
    )  # fmt: skip
    assert not any((x == MASKED).any() for x in upstream.values())
    history = MaskedSampler().commit_input(codes(), GEOMETRY, "cond")[0]
    assert torch.equal(fixed["cond"], history) and torch.equal(fixed["uncond"], history)


def test_the_stream_without_text_sees_the_past_in_the_published_program_only():
    seen = lambda **how: MaskedSampler(**how).commit_input(codes(), GEOMETRY, "uncond")[0]
    assert torch.equal(seen(compat="upstream"), MaskedSampler().commit_input(codes(), GEOMETRY, "cond")[0])
    assert (seen()[..., :-1] == MASKED).all() and (seen()[..., -1] == FIXED).all()
    assert torch.equal(seen(uncond_history="same"), seen(compat="upstream"))
    assert torch.equal(seen(compat="upstream", uncond_history="masked"), seen())


def test_a_history_mask_of_nothing_shows_everything():
    assert (MaskedSampler(history_mask=0).commit_input(codes(), GEOMETRY, "cond")[0] != MASKED).all()


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_takes_in_lockstep_equal_the_same_takes_alone(compat):
    host, sampler = tiny_lumos(codec=False), MaskedSampler(4, compat=compat)
    both = take(host, prompt=["red kite"] * 2, seed=3, sampler=sampler)
    alone = [take(host, seed=seed, sampler=sampler) for seed in (3, 4)]
    for _ in range(3):
        together = next(both).latents
        for i, one in enumerate(alone):
            assert torch.equal(together[i], next(one).latents)
    assert not torch.equal(together[0], together[1])


def test_the_same_seed_gives_the_same_codes_and_another_seed_others():
    host = tiny_lumos(codec=False)
    a, b, c = (next(take(host, seed=seed)).latents for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(("guidance", "streams"), [(1.0, 1), (3.0, 2), (0.0, 2)])
def test_nothing_is_computed_after_the_last_frame_that_nobody_reads(guidance, streams):
    session = take(chunks=3, guidance_scale=guidance)
    fed = Fed(session.host)
    list(session)
    assert len(fed.content) == streams * (3 * 4 + 2)  # two of three frames are committed
    assert session.stats.forwards == len(fed.content)
    assert [b.frame for b in session.history.table().blocks if b.span] == [0, 1]


def test_an_endless_take_commits_every_frame():
    session = take()
    for _ in range(2):
        next(session)
    assert [b.frame for b in session.history.table().blocks if b.span] == [0, 1]


def test_guidance_one_is_the_text_stream_alone():
    """With guidance 1 the formula gives the text stream's scores; without a second stream they are never combined."""
    host = tiny_lumos(codec=False)
    session = take(host, guidance_scale=1.0)
    assert list(session.history.streams) == ["cond"]
    near = take(host, guidance_scale=1.0 + 1e-7)
    assert torch.equal(next(session).latents, next(near).latents)
    assert not torch.equal(next(take(host, guidance_scale=1.0)).latents, next(take(host, guidance_scale=9.0)).latents)


def test_scores_are_made_of_visual_codes_at_masked_places_only():
    host = tiny_lumos(codec=False)
    session, made = take(host), []
    logits = host.logits

    def spy(hidden):
        out = logits(hidden)
        made.append(tuple(out.shape))
        return out

    host.logits = spy
    fed = Fed(host)
    next(session)
    masked_rows = [int((x == MASKED).sum()) for x in fed.content[:8:2]]
    assert made == [(1, rows, host.codes) for rows in masked_rows]


def test_scoring_rows_in_blocks_gives_the_codes_of_scoring_them_at_once(monkeypatch):
    made = []

    def frames():
        host = tiny_lumos(codec=False)
        logits, session = host.logits, take(host, seed=2)
        host.logits = lambda hidden: made.append(hidden.shape[1]) or logits(hidden)
        return torch.stack([next(session).latents for _ in range(2)])

    whole, at_once = frames(), made.copy()
    made.clear()
    monkeypatch.setattr(masked, "BLOCK_ELEMENTS", 64 * 7)  # seven rows at a time
    blocks = frames()
    assert max(at_once) == 32 and max(made) == 7 and sum(made) == sum(at_once)
    assert torch.equal(blocks, whole) and len(whole.unique()) > 8


def test_codes_come_as_often_as_they_are_likely():
    noise = CodeNoise([torch.Generator().manual_seed(0)])
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = noise.codes(0, 0, torch.zeros(1, 20_000, dtype=torch.long), p.log().expand(1, 20_000, 4))
    share = torch.bincount(drawn.flatten(), minlength=4) / 20_000
    assert (share - p).abs().max() < 0.015 and share[1] == 0  # four standard deviations


def test_gumbel_noise_has_its_mean_and_spread():
    noise = CodeNoise([torch.Generator().manual_seed(0)])
    drawn = noise.gumbel(0, 0, torch.zeros(1, 20_000, dtype=torch.long))
    assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.04)
    assert float(drawn.var()) == pytest.approx(1.645, abs=0.1)


def test_ties_stay_in_the_published_program_and_are_broken_in_the_mended_one():
    confidence, missing = torch.zeros(1, 5), torch.tensor([[5]])
    again = {c: MaskedSampler(compat=c)._least(confidence, 3, missing)[0].tolist() for c in ("upstream", "fixed")}
    assert again == {"upstream": [False] * 5, "fixed": [True] * 3 + [False] * 2}


def test_a_model_that_gives_nothing_finite_is_refused_even_in_the_last_frame():
    host = tiny_lumos(codec=False)
    session = take(host, chunks=1)
    host.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="was not committed"):
        next(session)


def test_a_callback_sees_every_step_and_may_replace_codes():
    seen = []

    def replace_all(session, step, timestep, given):
        seen.append((step, round(timestep), bool((given["latents"] >= 0).all())))
        return {"latents": torch.full_like(given["latents"], 5)}

    latents = next(take(callback_on_step_end=replace_all)).latents
    assert (latents == 5).all()
    assert seen == [(0, 1000, True), (1, 924, True), (2, 707, True), (3, 383, True)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "0 steps: a chunk needs at least 1"),
        ({"compat": "bugs"}, "compat 'bugs': use one of fixed, upstream"),
        ({"history_mask": 1.5}, "give a part between 0 and 1"),
        ({"temperature": -1.0}, "0 or more"),
        ({"uncond_history": "none"}, "use one of masked, same"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(wrong, says):
    with pytest.raises(LongtakeError, match=says) as error:
        replace(MaskedSampler(), **wrong)
    assert "\n" not in str(error.value)


def test_reuse_of_velocities_is_refused():
    with pytest.raises(LongtakeError, match="draws codes, not velocities"):
        take(reuse=ReusePolicy())


def test_steps_of_a_take_replace_the_models_own():
    session = take(num_inference_steps=2)
    fed = Fed(session.host)
    next(session)
    assert len(fed.content) == 2 * (2 + 1)


def test_a_host_that_draws_no_codes_is_told_so():
    from .tiny import text, tiny_wan

    with pytest.raises(LongtakeError, match="draws no codes: a masked sampler is for Lumos-1 models"):
        next(Session(tiny_wan(), FullHistory(), prompt_embeds=text(), sampler=MaskedSampler(), decode=False))
