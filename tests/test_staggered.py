"""Takes with several chunks in flight: equivalences, lengths, given frames, windows, prompts, snapshots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from longtake import FlowCacheKV, FullHistory, LongtakeError, NoReuse, Session, SlidingWindow
from longtake.chunk import Clock
from longtake.named import spec
from longtake.policies.registry import available, parse
from longtake.reuse import Decision, FlowCacheReuse, ReplayReuse, TeaCacheReuse
from longtake.samplers.chunked import Schedule
from longtake.samplers.flight import InFlight
from longtake.samplers.solvers import Euler
from longtake.samplers.staggered import Stagger
from longtake.samplers.step_matrix import StepMatrix
from longtake.samplers.unipc import UniPC

from .skyreels import tiny_skyreels
from .tiny import text, tiny_wan


def words(batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, 7, 10, generator=torch.Generator().manual_seed(seed))


def session(host: Any = None, **options: Any) -> Session:
    given = {
        "prompt_embeds": words(), "negative_prompt_embeds": words(seed=2), "decode": False, "seed": 3,
        "sampler": Stagger(steps=6, lag=2, window=25, overlap=5),
    }  # fmt: skip
    return Session(host or tiny_skyreels(), **(given | options))


def latents(take: Session) -> Tensor:
    return torch.cat([chunk.latents for chunk in take], -3)


# --- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_one_chunk_in_flight_equals_the_chunked_sampler(residency: str) -> None:
    """Bitwise, on a few-step model, under the same commit rule."""
    host = tiny_wan(guidance=2.0)
    options = {"prompt_embeds": text(), "negative_prompt_embeds": text(seed=2), "decode": False, "chunks": 4, "seed": 5}
    policy = SlidingWindow(9, sink=3)
    schedule = Schedule.shifted(host.config.timesteps, host.config.shift)
    host.timetable = lambda steps: (schedule.timesteps, (*schedule.sigmas, 0.0))
    chunked = latents(Session(host, policy, residency=residency, **options))
    staggered = latents(Session(host, policy, residency=residency, sampler=Stagger(lag=99), **options))
    assert torch.equal(chunked, staggered)


@pytest.mark.parametrize("carry", ["velocity", "update", "residual"])
@pytest.mark.parametrize("metric", ["latent", "timestep"])
def test_threshold_zero_equals_no_reuse_bitwise(metric: str, carry: str) -> None:
    reuse = FlowCacheReuse(0.0, metric, carry, 1, "chunk", "identity")
    assert torch.equal(latents(session(chunks=6)), latents(session(chunks=6, reuse=reuse)))


def test_a_threshold_above_zero_reuses_and_changes_the_video() -> None:
    take = session(chunks=6, reuse=FlowCacheReuse(10.0, "timestep", "velocity", 2, "chunk", "identity"))
    reused = latents(take)
    assert take.stats.reused > 0
    assert not torch.equal(reused, latents(session(chunks=6)))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_the_published_carry_repeats_the_last_computed_change_to_the_bit(solver: str) -> None:
    host = tiny_skyreels()
    host.solver = solver
    take = session(host, chunks=6, reuse=FlowCacheReuse(10.0, "timestep", "update", 2, "chunk", "identity"))
    changes: dict[int, Tensor] = {}
    step, repeated = take.rollout._step, 0

    def watched(chunk: InFlight, velocity: Tensor | None, clock: Clock) -> None:
        nonlocal repeated
        before = chunk.x
        step(chunk, velocity, clock)
        if velocity is None:
            assert torch.equal(chunk.x, before + changes[chunk.chunk])
            repeated += 1
        else:
            changes[chunk.chunk] = chunk.x - before

    take.rollout._step = watched
    list(take)
    assert 2 * repeated == take.stats.reused > 0


def test_after_a_step_without_a_velocity_the_solver_begins_again_at_first_order() -> None:
    levels = [1.0, 0.9, 0.75, 0.5, 0.2, 0.0]
    solver, x = UniPC(levels), torch.ones(1, 1, 1, 1, 1)
    for k in range(2):
        x = solver.step(x * (k + 1), x)
    solver.skip()
    again = UniPC(levels)
    again.load_state_dict(*solver.state_dict())
    for one in (solver, again):
        v = torch.full_like(x, 0.7)
        torch.testing.assert_close(one.step(v, x), x + (levels[4] - levels[3]) * v)
        assert one.scheduler.step_index == 4


def test_a_callback_sees_what_a_repeated_change_predicts_and_may_replace_it() -> None:
    reuse = FlowCacheReuse(10.0, "timestep", "update", 2, "chunk", "identity")
    plain = latents(session(chunks=4, reuse=reuse))
    seen = lambda s, step, t, k: {}
    assert torch.equal(plain, latents(session(chunks=4, reuse=reuse, callback_on_step_end=seen)))
    zero = lambda s, step, t, k: {"latents": torch.zeros_like(k["latents"])}
    torch.testing.assert_close(
        latents(session(chunks=4, reuse=reuse, callback_on_step_end=zero)), torch.zeros_like(plain), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("length", [{"chunks": 9}, {}, {"num_frames": 45}])
@pytest.mark.parametrize("kind", [FlowCacheReuse, TeaCacheReuse, ReplayReuse])
def test_a_schedule_is_told_only_where_every_chunk_follows_it(kind: Any, length: dict[str, int]) -> None:
    options = {"threshold": 1.0, "metric": "timestep", "warmup": 2, "last": "chunk", "rescale": "identity"}
    log = [Decision(chunk, k, 0.0, None, 0.0, chunk > 1 and k > 2, "") for chunk in range(99) for k in range(6)]
    reuse = ReplayReuse.of(log) if kind is ReplayReuse else kind(**options)
    take = session(reuse=reuse, guidance_scale=1.0, negative_prompt_embeds=None, **length)
    told = take.reuse_schedule()
    made = [[d.reused for d in chunk.stats.decisions] for _, chunk in zip(range(9), take, strict=False)]
    assert any(map(any, made)) or kind is ReplayReuse
    if kind is FlowCacheReuse:
        assert told is not None and made == [[d.reused for d in told]] * len(made)
    elif kind is TeaCacheReuse or "chunks" in length:
        assert told is None and made[0] != made[-1]


def test_rows_known_before_the_take_are_those_it_has() -> None:
    """Three windows; joint decisions of all of them."""
    reuse = TeaCacheReuse(1.0, "timestep", warmup=2, last="take", rescale="identity")
    take = session(chunks=11, reuse=reuse, guidance_scale=1.0, negative_prompt_embeds=None)
    told = [d for row in take._reuse.ahead(take.rollout.rows(take.chunks)) for d in row]
    made = [d for chunk in take for d in chunk.stats.decisions]
    key = lambda d: (d.chunk, d.index)
    assert sorted(told, key=key) == sorted(made, key=key)


def test_a_log_replays_to_the_bit_in_windows_of_several_chunks_in_flight() -> None:
    own = session(chunks=11, reuse=FlowCacheReuse(0.3, "latent", warmup=1, last="none", rescale="identity"))
    chunks = list(own)
    log = [d for chunk in chunks for d in chunk.stats.decisions]
    assert 0 < sum(d.reused for d in log) < len(log) == 11 * 6
    again = latents(session(chunks=11, reuse=ReplayReuse.of(log)))
    assert torch.equal(again, torch.cat([chunk.latents for chunk in chunks], -3))


def test_a_window_as_long_as_the_take_changes_nothing() -> None:
    options = {"chunks": 5, "sampler": Stagger(steps=6, lag=2)}
    host = tiny_skyreels(training_frames=25, overlap=None)
    full = latents(session(host, policy=FullHistory(), **options))
    assert torch.equal(full, latents(session(host, policy=SlidingWindow(25, sink=0), **options)))


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 6])
def test_residencies_agree(lag: int) -> None:
    sampler = Stagger(steps=6, lag=lag, window=25, overlap=5)
    one, other = (latents(session(chunks=6, sampler=sampler, residency=r)) for r in ("resident", "scratch"))
    assert torch.equal(one, other)


def test_takes_in_lockstep_equal_takes_alone() -> None:
    both = latents(session(prompt_embeds=torch.cat([words(), words(seed=9)]), seed=[3, 8], chunks=6))
    alone = [latents(session(prompt_embeds=words(seed=s), seed=n, chunks=6)) for s, n in ((1, 3), (9, 8))]
    assert torch.allclose(both, torch.stack(alone), atol=1e-5)


def test_no_guidance_is_one_stream() -> None:
    take = session(guidance_scale=1.0, chunks=2, negative_prompt_embeds=None)
    list(take)
    assert take.history.streams == ("cond",)
    assert take.stats.forwards == 2 * (6 + 1)  # steps and the clean pass


# --- what enters a forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("commit", "extra"), [("clean", 1), ("adopt", 0)])
def test_only_chunks_in_flight_enter_a_forward(commit: str, extra: int) -> None:
    """Every chunk takes each of its steps once; one that has not entered, or is done, costs nothing."""
    host = tiny_skyreels()
    seen: list[tuple[int, ...]] = []
    run = host._run
    host._run = lambda x, *rest: seen.append(tuple(x.shape)) or run(x, *rest)
    take = session(host, chunks=5, sampler=Stagger(steps=6, lag=2, window=25, overlap=5, commit=commit))
    list(take)
    assert len(seen) == take.stats.forwards == 2 * 5 * (6 + extra)
    assert {shape[2] for shape in seen} == {5}


def test_a_chunk_sees_those_before_it_and_itself() -> None:
    take = session(chunks=5)
    lengths = []
    make = take.history.layers
    take.history.layers = lambda *args, **kw: lengths.append(make(*args, **kw)) or lengths[-1]
    list(take)
    tokens = [layers[0].k.shape[1] // (5 * 4) for layers in lengths[::2]]  # of the first stream, in chunks
    assert tokens[:6] == [1, 1, 1, 2, 1, 2]  # lag 2: the second chunk enters in the third row
    assert max(tokens) == 5


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_frames", "spans"),
    [
        (1, [1]),
        (13, [4]),
        (17, [5]),
        (77, [5, 5, 5, 5]),
        (85, [5, 5, 5, 5, 2]),
        (97, [5, 5, 5, 5, 5]),
        (101, [5] * 5 + [1]),  # one frame into a second window
        (177, [5] * 9),  # two windows
        (257, [5] * 13),  # three
        (265, [5] * 13 + [2]),  # and an uneven tail
    ],
)  # fmt: skip
def test_any_number_of_frames(num_frames: int, spans: list[int]) -> None:
    take = session(num_frames=num_frames, guidance_scale=1.0, negative_prompt_embeds=None)
    chunks = list(take)
    assert [chunk.latents.shape[1] for chunk in chunks] == spans
    assert [chunk.stats.frame for chunk in chunks] == [5 * i for i in range(len(spans))]
    assert take.geometry.pixel_frames(sum(spans)) == num_frames
    assert all(bool(chunk.latents.isfinite().all()) for chunk in chunks)


def test_three_windows_of_two_takes_with_reuse_and_a_compressed_past() -> None:
    """The published fork runs one prompt at a time and ends after its first windows."""
    options = {
        "num_frames": 257, "guidance_scale": 1.0, "negative_prompt_embeds": None, "prompt_embeds": words(2),
        "seed": [3, 4], "policy": FlowCacheKV(4),
    }  # fmt: skip
    reuse = FlowCacheReuse(9.0, "timestep", warmup=2, last="chunk", rescale="identity")
    take = session(**options, reuse=reuse)
    made = latents(take)
    assert made.shape[2] == 65 and made.isfinite().all()
    assert take.stats.reused == 13 * 3  # of 6 steps two are first, and one is last
    for i in range(2):
        alone = session(**(options | {"prompt_embeds": words(2)[i : i + 1], "seed": 3 + i}), reuse=reuse)
        torch.testing.assert_close(latents(alone), made[i], rtol=0, atol=1e-4)


def test_windows_that_do_not_divide_into_chunks() -> None:
    take = session(tiny_skyreels(), sampler=Stagger(6, 2, window=12, overlap=3), num_frames=101)
    assert [chunk.latents.shape[1] for chunk in take] == [5, 5, 2, 5, 4, 5]


def test_every_window_begins_with_the_end_of_the_one_before() -> None:
    """The second window is a take of its own, given the overlap."""
    options = {"guidance_scale": 1.0, "negative_prompt_embeds": None}
    whole = latents(session(num_frames=177, **options))
    take = session(num_frames=97, seed=3, **options)
    take.noise.draw(4, 25, 4, 4)  # what the first window drew
    start = whole[None, :, 20:25]
    drawn = session(num_frames=97, **options)
    list(drawn)
    take.noise.restore(drawn.noise.state())
    take.extend(start)
    assert torch.equal(latents(take), whole[:, 25:45])


def test_memory_does_not_grow_from_window_to_window() -> None:
    take = session(decode=False)
    held = []
    for _ in range(3):
        held += [next(take) and take.memory()["total"] for _ in range(4)]
    assert held[3] == held[7] == held[11]


def test_an_endless_take_without_windows_keeps_its_memory() -> None:
    host = tiny_skyreels(overlap=None)
    take = session(host, policy=SlidingWindow(25, sink=5), sampler=Stagger(steps=6, lag=3))
    held = [next(take) and take.history.held_bytes for _ in range(9)]
    assert held[4:] == [held[4]] * 5


# --- given frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 10])
def test_given_latents_of_any_length_are_followed(frames: int) -> None:
    given = torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(4))
    take = session(num_frames=97)
    take.extend(given)
    out = latents(take)
    assert out.shape[1] == 25 - frames
    other = session(num_frames=97)
    other.extend(given + 1)
    assert not torch.allclose(out, latents(other))


@pytest.mark.parametrize("frames", [1, 17])
def test_pixels_are_encoded_and_followed(frames: int) -> None:
    """An image given to the session, and a video to be continued; the frames handed out begin after them."""
    host = tiny_skyreels(vae=tiny_wan(vae=True).vae)
    video = torch.rand(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    given = host.encode_video(video)
    assert given.shape == (1, 4, 1 + (frames - 1) // 4, 4, 4)
    told = {"decode": True, "num_frames": 97}
    take = session(host, **told, **({"image": video[0, :, 0]} if frames == 1 else {}))
    if frames > 1:
        take.extend(given)
    expected = session(host, **told)
    expected.extend(given)
    made, twin = list(take), list(expected)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(made, twin, strict=True))
    shown = torch.cat([chunk.frames for chunk in made])
    whole = host.decoder().push(torch.cat([given, *(chunk.latents[None] for chunk in made)], 2))[0]
    assert len(shown) == 97 - (0 if frames == 1 else frames), "the image is among them, the video is not"
    assert torch.equal(shown, whole[97 - len(shown) :])


def test_condition_noise_is_added_to_given_frames_and_told_to_the_model() -> None:
    host, seen = tiny_skyreels(), []
    run = host._run
    host._run = lambda x, t, *rest: seen.append((x.clone(), t)) or run(x, t, *rest)
    given = torch.ones(1, 4, 5, 4, 4)
    take = session(host, chunks=3, sampler=Stagger(6, 2, window=25, overlap=5, condition_noise=20.0))
    state = take.noise.state()
    take.extend(given)
    noise = session(host).noise
    noise.restore(state)
    expected = 0.98 * given + 0.02 * noise.draw(4, 5, 4, 4)
    assert [t for _, t in seen] == [20.0, 20.0]  # once in every stream, never again
    assert torch.allclose(seen[0][0], expected)


def test_a_take_that_has_begun_takes_no_given_frames() -> None:
    take = session(chunks=2)
    next(take)
    with pytest.raises(LongtakeError, match="before its first chunk"):
        take.extend(torch.zeros(1, 4, 5, 4, 4))


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("at", [1, 3])
def test_rewriting_the_past_under_its_own_prompt_changes_no_bit(at: int, residency: str) -> None:
    """Chunks are in flight meanwhile, and stay as they are."""
    options = {"residency": residency, "num_frames": 97, "keep_latents": True}
    whole = latents(session(**options))
    take = session(**options)
    first = [next(take).latents for _ in range(at)]
    assert take.rollout.live
    assert take.rebuild() == at
    assert torch.equal(torch.cat([*first, latents(take)], -3), whole)


def test_a_prompt_may_rewrite_what_has_finished() -> None:
    """What later chunks see of it then is a clean pass over its latents under the new prompt."""
    runs = {}
    for mode in ("keep", "recache"):
        take = session(num_frames=97, keep_latents=True, guidance_scale=1.0, negative_prompt_embeds=None)
        first = torch.cat([next(take).latents for _ in range(2)], -3)
        take.set_prompt_embeds(words(seed=9), mode=mode)
        take._obey()
        runs[mode] = take
    for block in (b.id for b in runs["keep"].history.table().blocks):
        k = {mode: take.history.stores["cond"] for mode, take in runs.items()}
        rows = {mode: store.held[(block, "full")].rows for mode, store in k.items()}
        old, new = (k[mode].k[:, :, rows[mode]] for mode in runs)
        assert (old[1:] - new[1:]).abs().max() > 1e-4  # the first layer's keys have not met the text yet
    alone = session(num_frames=97, guidance_scale=1.0, prompt_embeds=words(seed=9), negative_prompt_embeds=None,
                    sampler=Stagger(steps=6, lag=2))  # fmt: skip
    alone.extend(first[None])  # given latents are written by the same pass
    given = alone.history.stores["cond"]
    for block in (0, 1):
        made = runs["recache"].history.stores["cond"]
        a, b = (store.k[:, :, store.held[(block, "full")].rows] for store in (given, made))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.equal(*(latents(take) for take in runs.values()))


@pytest.mark.parametrize("mode", ["flush", "cut"])
def test_chunks_in_flight_do_not_lose_their_past(mode: str) -> None:
    take = session(num_frames=97)
    next(take)
    with pytest.raises(LongtakeError, match="'keep' it or 'recache'"):
        take.set_prompt_embeds(words(seed=9), mode=mode)


def test_latents_are_kept_for_what_the_history_holds_counted_and_restored(tmp_path: Any) -> None:
    host = tiny_skyreels(overlap=None)
    options = {"policy": SlidingWindow(25, sink=5), "sampler": Stagger(steps=6, lag=3), "keep_latents": True}
    take = session(host, **options)
    for _ in range(8):
        next(take)
    held = {b.id for b in take.history.blocks}
    kept = take.rollout.kept
    assert set(kept) <= held and len(kept) >= 3
    bare = session(host, **(options | {"keep_latents": False}))
    for _ in range(8):
        next(bare)
    more = take.memory()["latents"] - bare.memory()["latents"]
    assert more == sum(x.nbytes for x, _ in kept.values()) > 0
    take.snapshot(tmp_path / "take.safetensors")
    again = Session.restore(tmp_path / "take.safetensors", host)
    for one in (take, again):
        one.set_prompt_embeds(words(seed=9), mode="recache")
    assert torch.equal(next(take).latents, next(again).latents)


# --- prompts, callbacks -----------------------------------------------------------------------------------------------


def test_a_new_prompt_is_for_chunks_that_enter_later() -> None:
    one, other = session(chunks=5), session(chunks=5)
    first = [next(take).latents for take in (one, other)]
    assert torch.equal(*first)
    other.set_prompt_embeds(words(seed=7))
    rest = [[chunk.latents for chunk in take] for take in (one, other)]
    # with lag 2 of 6 steps, three chunks were in flight: the two left keep their prompt
    assert [torch.equal(a, b) for a, b in zip(*rest, strict=True)] == [True, True, False, False]


def test_a_callback_sees_and_may_replace_what_a_step_predicts() -> None:
    calls = []

    def look(take: Session, step: int, t: float, given: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append((step, t))
        return {"latents": given["latents"].clamp(-0.5, 0.5)}

    take = session(chunks=2, callback_on_step_end=look)
    out = latents(take)
    assert len(calls) == 2 * 6
    assert calls[0] == (0, 999.0)
    assert float(out.abs().max()) < 0.6  # UniPC's last step is the prediction itself
    assert float(latents(session(chunks=2)).abs().max()) > 0.6


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("at", [1, 4, 5, 6])
def test_a_restored_take_goes_on_to_the_bit(at: int, residency: str, tmp_path: Any) -> None:
    """Between two rows, with other chunks in flight, half-way through a window or right after one."""
    host = tiny_skyreels()
    reuse = FlowCacheReuse(0.05, "timestep", "residual", 1, "chunk", "identity")
    take = session(host, chunks=9, residency=residency, reuse=reuse)
    for _ in range(at):
        next(take)
    assert take.rollout.live or at == 5
    take.snapshot(tmp_path / "take.safetensors")
    rest = latents(take)
    again = Session.restore(tmp_path / "take.safetensors", host)
    assert torch.equal(rest, latents(again))


def test_a_row_that_fails_can_be_repeated() -> None:
    """Out of memory, or Ctrl-C, in the middle of a row: the next call goes on from there."""
    host = tiny_skyreels()
    whole = latents(session(host, chunks=4))
    take, run, count = session(host, chunks=4), host._run, 0

    def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count in (7, 8, 21, 40):
            raise KeyboardInterrupt
        return run(*args)

    host._run = failing
    parts = []
    while len(parts) < 4:
        try:
            parts.append(next(take).latents)
        except KeyboardInterrupt:
            continue
    assert torch.equal(torch.cat(parts, 1), whole)


# --- settings and solvers ---------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused_with_advice() -> None:
    with pytest.raises(LongtakeError, match="use 0"):
        StepMatrix(10, -1)
    with pytest.raises(LongtakeError, match="say how many"):
        session(tiny_skyreels(overlap=None), sampler=Stagger(steps=6, lag=0))
    with pytest.raises(LongtakeError, match="overlap by less"):
        Stagger(window=5, overlap=5)
    with pytest.raises(LongtakeError, match="clean, adopt"):
        Stagger(commit="dirty")
    with pytest.raises(LongtakeError, match="use lag=2 or more"):
        session(tiny_skyreels(overlap=None), policy=SlidingWindow(50), sampler=Stagger(steps=6, lag=1))
    with pytest.raises(LongtakeError, match="use frames="):
        session(tiny_skyreels(), policy=SlidingWindow(10, sink=0))
    for frames in (0, 30):
        with pytest.raises(LongtakeError, match="latent"):
            session(num_frames=97).extend(torch.randn(1, 4, frames, 4, 4))


@pytest.mark.parametrize("name", sorted(set(available()) - {"packforcing"}))
def test_every_policy_goes_with_several_chunks_in_flight_and_reuse(name: str) -> None:
    """Into a second window, after a given beginning."""
    enough = {"deep-forcing": ":frames=27", "infinity-rope": ":frames=16", "longlive": ":frames=18"}
    reuse = FlowCacheReuse(0.2, "latent", warmup=2, last="chunk", rescale="identity")
    take = session(policy=parse(name + enough.get(name, "")), reuse=reuse, num_frames=117)
    take.extend(torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    chunks = list(take)
    assert sum(chunk.latents.shape[1] for chunk in chunks) == 27 and sum(chunk.stats.reused for chunk in chunks) > 0
    assert all(chunk.latents.isfinite().all() for chunk in chunks)
    assert "chunk_tokens" not in spec(take.policy)


def test_unipc_of_a_chunk_equals_unipc_of_every_latent_frame() -> None:
    levels = [0.999, 0.9, 0.7, 0.4, 0.1, 0.0]
    generator = torch.Generator().manual_seed(0)
    x, velocities = torch.randn(2, 4, 5, 3, 3, generator=generator), torch.randn(5, 2, 4, 5, 3, 3, generator=generator)
    whole, frames = UniPC(levels), [UniPC(levels) for _ in range(5)]
    y = x
    for v in velocities:
        y = torch.stack([one.step(v[:, :, i], y[:, :, i]) for i, one in enumerate(frames)], 2)
        x = whole.step(v, x)
        assert torch.equal(x, y)


def test_unipc_as_published_starts_its_first_corrector_one_step_late() -> None:
    """diffusers' pipelines write the step's answer into the memory that the scheduler remembers its start by."""
    levels, steps = [0.999, 0.9, 0.7, 0.4, 0.1, 0.0], 5
    start, *velocities = torch.randn(6, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    scheduler.set_timesteps(sigmas=np.array(levels[:-1]))
    held = start.clone()
    results = {}
    for k in range(steps):
        held[:] = scheduler.step(velocities[k], scheduler.timesteps[k], held[:], return_dict=False)[0]
    for compat in ("fixed", "upstream"):
        solver, x = UniPC(levels, compat), start.clone()
        for v in velocities:
            x = solver.step(v, x)
        results[compat] = x
    assert torch.equal(results["upstream"], held)
    assert not torch.allclose(results["fixed"], held, atol=1e-3)


def test_euler_of_one_step_and_of_many() -> None:
    x, v, w = torch.randn(3, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Euler([0.25, 1.0]).step(v, x), x + 0.75 * v)
    solver = Euler([0.0, 0.25, 0.5, 1.0])
    made = solver.step(w, solver.step(v, solver.step(v, x)))
    torch.testing.assert_close(made, x + 0.5 * v + 0.5 * w)


def test_no_policy_of_reuse_is_needed() -> None:
    assert isinstance(session(chunks=1).reuse, NoReuse)
    assert replace(Stagger(), lag=7).lag == 7
