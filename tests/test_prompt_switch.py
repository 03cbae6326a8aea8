"""What a new prompt does to the past: keep, recache, flush, cut."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longtake import (
    DeepForcing,
    DummyForcing,
    FullHistory,
    InfinityRope,
    LongLive,
    LongtakeError,
    NonFiniteError,
    PackForcing,
    Session,
    SlidingWindow,
)
from longtake.cli import app
from longtake.plan import as_tensor
from longtake.switching import CUT_FRAMES, SWITCHES

from .test_equivalences import latents_of
from .test_packforcing import Identity
from .tiny import text, tiny_wan

NEW = text(seed=5)
POLICIES = [
    FullHistory(), SlidingWindow(9, 3), LongLive(9), InfinityRope(), DeepForcing(frames=11, sink=1), DummyForcing(),
    PackForcing(sink=1, top_k=1, archive=3), PackForcing(sink=1, top_k=1, archive=3, middle="full"),
    PackForcing(sink=1, top_k=1, archive=3, layers="shared", offload=True),
    PackForcing(sink=1, top_k=1, archive=3, middle="full", layers="shared", offload=True),
]  # fmt: skip


def take_of(policy, host=None, **options) -> Session:
    options = {"prompt_embeds": text(), "negative_prompt_embeds": text(seed=9), "decode": False} | options
    return Session(host or tiny_wan(guidance=2.0, timesteps=(1000, 500)), policy, **options)


def rows(take: Session, form: str = "full") -> dict:
    """K and V of every held block, by stream and block."""
    return {
        (stream, block): (store.k[:, :, held.rows].clone(), store.v[:, :, held.rows].clone())
        for stream, store in take.history.stores.items()
        for (block, kind), held in store.held.items()
        if kind == form
    }


def held_frames(take: Session) -> list[int]:
    return sorted(
        block.frame + int(token) // take.geometry.tokens_per_frame
        for block in take.history.table().blocks
        for token in as_tensor(block.forms["full"].owned)[:: take.geometry.tokens_per_frame]
        if "full" in block.forms
    )


def given(take_latents: list, policy, prompt, **options) -> Session:
    """A take under `prompt` whose first chunks are these latents."""
    force = lambda s, step, t, kw: {"latents": take_latents[s.index][None]} if s.index < len(take_latents) else None
    other = take_of(policy, prompt_embeds=prompt, callback_on_step_end=force, **options)
    for _ in take_latents:
        next(other)
    return other


# --- keep -------------------------------------------------------------------------------------------------------------


def test_keep_is_the_default_and_leaves_the_past_as_it_was():
    take, same = take_of(SlidingWindow(12, 3)), take_of(SlidingWindow(12, 3), prompt_switch="keep")
    latents_of(take, 3), latents_of(same, 3)
    before = rows(take)
    take.set_prompt_embeds(NEW)
    same.set_prompt_embeds(NEW)
    assert torch.equal(next(take).latents, next(same).latents)
    after = rows(take)
    assert take.prompt_switch == "keep" and set(before) < set(after)
    assert all(torch.equal(a, b) for key in before for a, b in zip(before[key], after[key], strict=True))


def test_policies_bring_their_own_way_and_a_session_may_say_another():
    ways = {LongLive(): "recache", InfinityRope(): "flush", SlidingWindow(): "keep", PackForcing(): "keep"}
    assert {policy: take_of(policy).prompt_switch for policy in ways} == ways
    assert take_of(LongLive(), prompt_switch="keep").prompt_switch == "keep"
    assert take_of(LongLive()).rollout.kept == {} and take_of(LongLive(), prompt_switch="keep").rollout.kept is None


# --- recache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        FullHistory(),
        PackForcing(sink=2, recent=3),
        PackForcing(sink=1, middle="full", top_k=9, archive=9),
        LongLive(18),
    ],
    ids=repr,
)
def test_a_recache_is_a_cache_built_from_the_latents_under_the_new_prompt(policy):
    take = take_of(policy, prompt_switch="recache")
    latents = [next(take).latents for _ in range(5)]
    take.set_prompt_embeds(NEW)
    after = next(take).latents
    other = given(latents, policy, NEW)
    torch.testing.assert_close(next(other).latents, after, atol=1e-5, rtol=0)
    for form in ("full", "compressed"):
        ours, theirs = rows(take, form), rows(other, form)
        assert set(ours) == set(theirs) and (ours or form == "compressed")
        for key in ours:
            for a, b in zip(ours[key], theirs[key], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    stale = take_of(policy, prompt_switch="keep")
    latents_of(stale, 5)
    stale.set_prompt_embeds(NEW)
    assert not torch.allclose(next(stale).latents, after, atol=1e-3)


def test_an_identity_compressor_is_recached_as_full_history_is():
    packed = take_of(PackForcing(sink=2, recent=4), compressor=Identity(), prompt_switch="recache")
    full = take_of(FullHistory(), prompt_switch="recache")
    torch.testing.assert_close(latents_of(packed, 5), latents_of(full, 5), atol=1e-5, rtol=0)
    for take in (packed, full):
        take.set_prompt_embeds(NEW)
    torch.testing.assert_close(latents_of(packed, 3), latents_of(full, 3), atol=1e-5, rtol=0)


def test_key_sums_are_made_anew_by_a_recache():
    take = take_of(PackForcing(sink=1, recent=2), prompt_switch="recache")
    latents = [next(take).latents for _ in range(3)]
    take.set_prompt_embeds(NEW)
    next(take)
    other = given(latents, PackForcing(sink=1, recent=2), NEW)
    next(other)
    for stream in take.history.streams:
        for key, held in take.history.stores[stream].held.items():
            if held.key_sum is not None:
                torch.testing.assert_close(
                    held.key_sum, other.history.stores[stream].held[key].key_sum, atol=1e-4, rtol=0
                )


def test_an_interrupted_recache_is_made_good():
    sound, shaken = (take_of(SlidingWindow(12, 3), prompt_switch="recache") for _ in range(2))
    for take in (sound, shaken):
        latents_of(take, 4)
        take.set_prompt_embeds(NEW)
    calls, forward = [], shaken.host.forward

    def interrupt(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*given)

    shaken.host.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(shaken)
    shaken.host.forward = forward
    assert torch.equal(latents_of(shaken, 3), latents_of(sound, 3))


# --- flush ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flush", "cut"])
def test_a_flush_keeps_the_first_frame_and_the_last_two(mode):
    take = take_of(InfinityRope())
    latents_of(take, 4)
    take.set_prompt_embeds(NEW, mode=mode)
    assert held_frames(take) == [0, *range(7, 12)]  # not before the next chunk
    chunk = next(take)
    assert held_frames(take)[:3] == [0, 10, 11] and chunk.stats.attended_tokens == 6 * 6


def test_after_a_flush_the_first_frame_stands_right_before_the_last_two():
    """Slots 0, 1, 2 and the chunk at 3, 4, 5, as a fresh take whose history these frames were."""
    take = take_of(InfinityRope())
    latents_of(take, 4)
    take.history.forget(take.policy.flush(take.history.table()))
    block = take.rollout.admit(3)
    view = take.history.layers("cond", block)[0]
    frames = {b.id: b.frame for b in take.history.table().blocks}
    plan = take.history.views["cond"].plan
    at = [frames[e.block] + int(next(iter(e.tokens))) // 6 + e.shift for e in plan.entries]
    assert at == [9, 10] and view.k.shape[1] == 6 * 6
    take.history.abandon(block)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_any_policy_goes_on_after_any_switch(policy):
    for mode in SWITCHES:
        take = take_of(policy, keep_latents=True)
        latents_of(take, 6)
        take.set_prompt_embeds(NEW, mode=mode)
        assert torch.isfinite(latents_of(take, 6)).all()
        if mode in ("flush", "cut"):
            middle = [b for b in take.history.table().blocks if b.frame >= 3 and b.end <= 15]
            assert not middle, "what was flushed stays away"


def test_a_flush_forgets_the_latents_it_has_no_use_for():
    take = take_of(FullHistory(), keep_latents=True, prompt_switch="flush")
    latents_of(take, 5)
    take.set_prompt_embeds(NEW)
    next(take)
    assert set(take.rollout.kept) == {b.id for b in take.history.table().blocks} == {0, 4, 5}


def test_packforcing_flushes_its_archive_in_host_memory_too():
    take = take_of(PackForcing(sink=1, top_k=1, archive=4, layers="shared", offload=True))
    latents_of(take, 7)
    assert take.history.archives["cond"].held
    take.set_prompt_embeds(NEW, mode="flush")
    next(take)
    assert not take.history.archives["cond"].held and not bool(take.history.archives["cond"].used.any())


# --- cut --------------------------------------------------------------------------------------------------------------


def test_the_first_chunk_after_a_cut_stands_far_off_and_the_next_does_not():
    take = take_of(InfinityRope())
    latents_of(take, 4)
    take.set_prompt_embeds(NEW, mode="cut")
    shifts, apply = [], take.history.apply

    def watched(plan):
        shifts.append(plan.live_shift)
        apply(plan)

    take.history.apply = watched
    next(take)
    base = take.history.stores["cond"].base[take.history.stores["cond"].held[(4, "full")].rows]
    assert base[:, 0].unique().tolist() == [12.0, 13.0, 14.0]  # later it stands where it was made
    latents_of(take, 2)
    assert shifts == [CUT_FRAMES, 0, 0] and CUT_FRAMES == 45 - 3


def test_a_cut_differs_from_a_flush_and_a_flush_from_keeping():
    chunks = {}
    for mode in SWITCHES:
        take = take_of(SlidingWindow(12, 3, positions="slots"), keep_latents=True)
        latents_of(take, 5)
        take.set_prompt_embeds(NEW, mode=mode)
        chunks[mode] = next(take).latents
    for a in SWITCHES:
        for b in SWITCHES:
            assert (a == b) == torch.allclose(chunks[a], chunks[b], atol=1e-3)


def test_key_sums_and_query_sums_of_a_cut_chunk_are_those_of_its_own_place():
    policy = PackForcing(sink=0, recent=1, top_k=1, archive=4, layers="shared", middle="full")
    take = take_of(policy, tiny_wan(timesteps=(1000,)))
    latents_of(take, 2)
    take.set_prompt_embeds(NEW, mode="cut")
    next(take)
    store, rotary = take.history.stores["cond"], take.history.rotary
    held = store.held[(2, "full")]
    keys = rotary.rotate(store.k[1][:, held.rows], rotary.phases(store.base[held.rows]))
    torch.testing.assert_close(held.key_sum[1], keys.sum(1), atol=1e-4, rtol=0)


# --- whatever happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SWITCHES)
def test_a_chunk_that_fails_right_after_a_switch_changes_nothing(mode):
    sound, shaken = (take_of(SlidingWindow(12, 3), keep_latents=True) for _ in range(2))
    for take in (sound, shaken):
        latents_of(take, 4)
        take.set_prompt_embeds(NEW, mode=mode)
    forward = shaken.host.forward
    recached = 2 * 4 if mode == "recache" else 0  # four chunks, two streams
    calls = []

    def spoilt(*given):
        calls.append(1)
        return forward(*given) * (float("nan") if len(calls) == recached + 1 else 1.0)

    shaken.host.forward = spoilt
    with pytest.raises(NonFiniteError):
        next(shaken)
    shaken.host.forward = forward
    assert torch.equal(latents_of(shaken, 3), latents_of(sound, 3))


@pytest.mark.parametrize("mode", SWITCHES)
@pytest.mark.parametrize("after", [0, 1], ids=["before it is obeyed", "after"])
def test_a_restored_take_obeys_as_if_never_stopped(mode, after, tmp_path):
    policy = PackForcing(sink=1, top_k=1, archive=3)
    take = take_of(policy, prompt_switch=mode)
    latents_of(take, 5)
    take.set_prompt_embeds(NEW)
    latents_of(take, after) if after else None
    take.snapshot(tmp_path / "take.safetensors")
    other = Session.restore(tmp_path / "take.safetensors", take.host)
    assert other.prompt_switch == mode
    assert torch.equal(latents_of(take, 3), latents_of(other, 3))


def test_switch_takes_words_and_a_mode():
    take = take_of(SlidingWindow(9, 3))
    take.host.encode_prompt = lambda prompts: NEW
    take.switch("another", mode="flush")
    assert take.prompt == "another" and take._pending_mode == "flush"
    take.prompt = "a third"
    assert take.prompt == "a third" and take._pending_mode == "keep"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: take_of(FullHistory(), prompt_switch="fade"), "'fade': use one of keep, recache, flush, cut"),
        (lambda: take_of(FullHistory()).set_prompt_embeds(NEW, mode="fade"), "'fade': use one of"),
        (lambda: take_of(FullHistory()).set_prompt_embeds(NEW, mode="recache"), "keep_latents=True"),
    ],
)
def test_a_switch_that_cannot_be_made_is_refused_in_one_line(change, message):
    with pytest.raises(LongtakeError, match=message) as error:
        change()
    assert "\n" not in str(error.value)


def generate(tmp_path, *more: str) -> dict:
    command = ["generate", "a red ball", "-o", str(tmp_path / "t.mp4"), "--latents", str(tmp_path / "t.safetensors"),
               "--chunks", "4", "--size", "32x32", "--prompt-switch", "1:a blue square", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, [*command, *more])
    return {
        "exit": result.exit_code,
        "said": result.output,
        "json": result.stdout,
        "latents": (tmp_path / "t.safetensors"),
    }


def test_the_command_line_names_the_mode(tmp_path):
    from safetensors.torch import load_file

    made = {}
    for mode in SWITCHES:
        done = generate(tmp_path, "--switch-mode", mode)
        assert done["exit"] == 0, done["said"]
        assert json.loads(done["json"])["chunks"] == 4
        made[mode] = torch.cat(list(load_file(done["latents"]).values()), 0)
    assert len({tuple(x.flatten()[-200:].tolist()) for x in made.values()}) == len(SWITCHES)
    done = generate(tmp_path, "--switch-mode", "fade")
    assert done["exit"] == 2 and "keep, recache, flush" in done["said"].replace("\n", " ")
    alone = CliRunner().invoke(app, ["generate", "a ball", "-o", str(tmp_path / "a.mp4"), "--switch-mode", "flush"])
    assert alone.exit_code == 2 and "give --prompt-switch" in alone.output and not (tmp_path / "a.mp4").exists()
