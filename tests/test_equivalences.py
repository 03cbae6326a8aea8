"""The equivalences that define correctness, on the causal Wan host: a fast path equals an obvious one."""

import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from longtake import FullHistory, LongtakeError, Session, SlidingWindow, policies
from longtake.decoding import encode
from longtake.hosts.loading import load
from longtake.policies import KVPolicy
from longtake.samplers.chunked import NoiseSource
from longtake.session import history_shape

from .reference.wan import block_causal_forward, rollout
from .tiny import text, tiny_wan

CLOSE = {"atol": 1e-5, "rtol": 0}
NEVER_COVERS = {"dummy-forcing"}  # policies that hide something from the first chunk on


class Recorded:
    """Seeded noise that remembers what was drawn, so that a slow twin can use the same."""

    def __init__(self, *seeds: int):
        self.source = NoiseSource([torch.Generator().manual_seed(s) for s in seeds])
        self.drawn: list[torch.Tensor] = []

    def draw(self, *size: int) -> torch.Tensor:
        self.drawn.append(self.source.draw(*size))
        return self.drawn[-1]


def latents_of(take: Session, chunks: int) -> torch.Tensor:
    """The next chunks' latents, one after the other along time."""
    return torch.cat([next(take).latents for _ in range(chunks)], dim=-3)


def image(seed: int = 3, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def roomy(cls: type[KVPolicy], host, frames: int, streams: int = 1) -> KVPolicy:
    """A policy of this class with room for the whole take."""
    shape = history_shape(host, host.geometry(), 1, streams)
    try:
        return cls().fit(2 * frames * shape.frame_bytes, shape)
    except LongtakeError:
        return cls()


# --- full history is one block-causal forward (equivalence 1) ---------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("takes", [1, 2])
def test_a_full_history_take_equals_block_causal_forwards_over_all_frames(first, takes):
    host = tiny_wan(layers=3, vae=True, guidance=2.5, timesteps=(1000, 600))
    noise, prompt, negative = Recorded(*range(takes)), text(takes), text(1, seed=9)
    take = Session(
        host, FullHistory(), prompt_embeds=prompt, negative_prompt_embeds=negative, noise=noise, decode=False,
        image=image() if first else None,
    )  # fmt: skip
    ours = [next(take).latents.view(takes, 4, 3, 4, 6) for _ in range(4)]

    def velocity(latents, times, spans):
        cond, uncond = (
            block_causal_forward(host.transformer, latents, times, t.expand(takes, -1, -1), spans)
            for t in (prompt, negative)
        )
        return uncond + 2.5 * (cond - uncond)

    given = encode(host.vae, image()[None, :, None]).expand(takes, -1, -1, -1, -1) if first else None
    draws = [noise.drawn[2 * i : 2 * i + 2] for i in range(4)]
    theirs = rollout(velocity, draws, take.schedule.timesteps, given)
    scale = max(float(x.abs().max()) for x in theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert float((a - b).abs().max()) < 1e-5 * max(1, scale), f"chunk {i}"


@pytest.mark.parametrize("spans", [(3, 3, 3, 2), (1, 3, 3, 1), (2, 5)])
@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_commit_passes_of_uneven_chunks_equal_one_block_causal_forward(spans, residency):
    host = tiny_wan(layers=3)
    frames = sum(spans)
    latents = torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(5))
    take = Session(host, FullHistory(), prompt_embeds=text(), decode=False, residency=residency)
    history, ours, start = take.history, [], 0
    for span in spans:
        block = history.admit(start, span, host.positions(take.geometry, start, span))
        history.apply(take.policy.plan(history.table(), history.signals()))
        ours.append(
            host.forward(
                latents[:, :, start : start + span],
                0.0,
                host.text_state(text()),
                history.layers("cond", block, write=True),
            )
        )
        history.commit(block)
        start += span
    whole = block_causal_forward(host.transformer, latents, [0.0] * frames, text(), spans)
    torch.testing.assert_close(torch.cat(ours, 2), whole, **CLOSE)


def test_the_block_causal_twin_notices_a_lost_frame():
    host = tiny_wan(layers=3, timesteps=(1000,))
    noise = Recorded(0)
    take = Session(host, SlidingWindow(8, sink=0), prompt_embeds=text(), noise=noise, decode=False)
    ours = [next(take).latents for _ in range(3)]
    velocity = lambda x, times, spans: block_causal_forward(host.transformer, x, times, text(), spans)
    theirs = rollout(velocity, [[d] for d in noise.drawn], take.schedule.timesteps)
    assert torch.allclose(ours[1], theirs[1][0], **CLOSE)
    assert not torch.allclose(ours[2], theirs[2][0], atol=1e-3)


# --- a policy that covers the take is full history (equivalence 2) ----------------------------------------------------


@pytest.mark.parametrize("name", sorted(policies.available()))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_policy_equals_full_history_to_the_bit_while_it_covers_the_take(name, guidance):
    host = tiny_wan(guidance=guidance, timesteps=(1000,))
    chunks = 5
    policy = roomy(policies.available()[name], host, 3 * chunks, 2 if guidance != 1 else 1)
    options = {"prompt_embeds": text(), "negative_prompt_embeds": text(seed=4), "decode": False}
    take, full = Session(host, policy, **options), Session(host, FullHistory(), **options)
    covered = 0
    for _ in range(chunks):
        block = take.rollout.admit(3)  # the table of the chunk about to be made, as the policy will see it
        covers = policy.covers(take.history.table())
        take.history.abandon(block)
        if not covers:
            break
        assert torch.equal(next(take).latents, next(full).latents)
        covered += 1
    assert covered == (1 if name in NEVER_COVERS else chunks)


def test_a_window_stops_covering_when_it_first_forgets():
    host = tiny_wan(timesteps=(1000,))
    take, full = (
        Session(host, p, prompt_embeds=text(), decode=False) for p in (SlidingWindow(9, sink=3), FullHistory())
    )
    equal = [torch.equal(next(take).latents, next(full).latents) for _ in range(5)]
    assert equal == [True, True, True, False, False]


# --- positions are relative (equivalence 4) ---------------------------------------------------------------------------

MOVERS = [
    FullHistory(),
    SlidingWindow(9, sink=3),
    SlidingWindow(9, sink=3, positions="slots"),
    SlidingWindow(7, sink=0),
]


def later(host, frames: int):
    """The host, with every temporal position moved by a constant."""
    original = host.positions
    host.positions = lambda geometry, frame, span: original(geometry, frame + frames, span)
    return host


@pytest.mark.parametrize("policy", MOVERS, ids=repr)
@pytest.mark.parametrize("constant", [1, 5000])
def test_a_constant_added_to_all_positions_changes_nothing(policy, constant):
    """5000 lies beyond the 1024 latent frames where the stock model's own rotary table ends."""
    here = latents_of(Session(tiny_wan(), policy, prompt_embeds=text(), decode=False), 6)
    there = latents_of(Session(later(tiny_wan(), constant), policy, prompt_embeds=text(), decode=False), 6)
    torch.testing.assert_close(there, here, **CLOSE)
    assert not torch.equal(there, here)  # the positions did change


def test_a_take_goes_on_beyond_the_end_of_the_stock_rotary_table():
    take, same = (Session(tiny_wan(), SlidingWindow(9, sink=0), prompt_embeds=text(), decode=False) for _ in range(2))
    take.rollout.frame = 5000
    torch.testing.assert_close(latents_of(take, 4), latents_of(same, 4), **CLOSE)
    assert take.frame == 5012 > take.host.transformer.rope.max_seq_len


def test_slots_equal_absolute_positions_without_a_sink():
    takes = [
        Session(tiny_wan(), SlidingWindow(9, sink=0, positions=p), prompt_embeds=text(), decode=False)
        for p in ("slots", "absolute")
    ]  # fmt: skip
    torch.testing.assert_close(*(latents_of(take, 6) for take in takes), **CLOSE)


def test_slots_differ_from_absolute_positions_once_a_gap_opens_behind_the_sink():
    takes = [
        Session(tiny_wan(), SlidingWindow(9, sink=3, positions=p), prompt_embeds=text(), decode=False)
        for p in ("slots", "absolute")
    ]  # fmt: skip
    a, b = (latents_of(take, 4) for take in takes)
    assert torch.allclose(a[:, :9], b[:, :9], **CLOSE)
    assert not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-4)


# --- streamed decode is one decode (equivalence 5) --------------------------------------------------------------------


@torch.no_grad()
def one_shot(vae, latents: torch.Tensor) -> torch.Tensor:
    """uint8 frames [T, H, W, 3] of all latents [C, f, h, w] at once, by the stock decode."""
    pixels = vae.decode(latents[None]).sample[0]
    return ((pixels.permute(1, 2, 3, 0) * 0.5 + 0.5) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("first", [False, True], ids=["text", "image"])
def test_frames_of_a_take_equal_one_decode_of_all_its_latents(first):
    host = tiny_wan(vae=True)
    take = Session(host, SlidingWindow(9), prompt_embeds=text(), image=image() if first else None)
    chunks = [next(take) for _ in range(4)]
    latents = torch.cat([c.latents for c in chunks], 1)
    if first:
        latents = torch.cat((encode(host.vae, image()[None, :, None])[0], latents), 1)
    frames = torch.cat([c.frames for c in chunks])
    assert torch.equal(frames, one_shot(host.vae, latents))
    assert len(frames) == take.geometry.pixel_frames(latents.shape[1])


def test_sessions_sharing_a_vae_with_an_encode_in_between_disturb_nothing():
    host = tiny_wan(vae=True)
    alone = [
        torch.cat([next(t).frames for _ in range(3)])
        for t in (Session(host, prompt_embeds=text(), seed=s) for s in (1, 2))
    ]
    first, second = (Session(host, prompt_embeds=text(), seed=s) for s in (1, 2))
    frames = [[], []]
    for _ in range(3):
        frames[0].append(next(first).frames)
        host.encode_image(image()[None])
        host.vae.decode(torch.zeros(1, 4, 2, 4, 6))
        frames[1].append(next(second).frames)
    assert all(torch.equal(torch.cat(f), a) for f, a in zip(frames, alone, strict=True))


# --- sessions are isolated, snapshots complete, hosts reversible (equivalence 6) --------------------------------------


def test_interleaved_sessions_equal_separate_ones():
    options = [
        {"policy": SlidingWindow(9, sink=3), "prompt_embeds": text(seed=1), "seed": 1},
        {"policy": SlidingWindow(6, sink=0, positions="slots"), "prompt_embeds": text(2, seed=2), "seed": 5,
         "guidance_scale": 4.0, "negative_prompt_embeds": text(seed=8), "residency": "scratch"},
    ]  # fmt: skip
    alone = [latents_of(Session(tiny_wan(), decode=False, **o), 5) for o in options]
    host = tiny_wan()
    takes = [Session(host, decode=False, **o) for o in options]
    both = [[next(take).latents for take in takes] for _ in range(5)]
    for i in range(2):
        assert torch.equal(torch.cat([pair[i] for pair in both], -3), alone[i])


def test_sessions_in_threads_equal_separate_ones():
    host = tiny_wan(vae=True)
    alone = [latents_of(Session(tiny_wan(vae=True), prompt_embeds=text(seed=s), seed=s), 4) for s in range(3)]
    takes = [Session(host, prompt_embeds=text(seed=s), seed=s) for s in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda take: latents_of(take, 4), takes))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


NAMES = sorted(policies.available())
SITUATIONS = {
    "plain": {},
    "guidance": {"guidance_scale": 3.0, "negative_prompt_embeds": text(seed=6)},
    "image": {"image": image()},
    "lockstep": {"prompt_embeds": text(2)},
    "all": {
        "prompt_embeds": text(2), "image": image(), "guidance_scale": 3.0, "negative_prompt_embeds": text(seed=6),
        "num_inference_steps": 3,
    },
}  # fmt: skip


def small(name: str) -> KVPolicy:
    """A configuration that has forgotten, moved or compressed something after a few chunks of `tiny_wan`."""
    cls = policies.available()[name]
    host = tiny_wan()
    shape = history_shape(host, host.geometry())
    for frames in range(7, 64):
        try:
            policy = cls().fit(frames * shape.frame_bytes, shape)
            policy.check(shape)
            return policy
        except LongtakeError:
            continue
    return cls()


# residency, guidance, first image, pending prompt, takes: every pair of values occurs
MIXES = [
    ("resident", False, False, False, 1),
    ("scratch", True, False, True, 1),
    ("scratch", False, True, False, 2),
    ("resident", True, True, True, 2),
    ("resident", False, False, True, 2),
    ("scratch", True, True, False, 1),
]


def assert_restored_take_goes_on(policy, mix, decode, path):
    residency, guided, first, pending, takes = mix
    options = {"prompt_embeds": text(takes), "residency": residency, "decode": decode, "seed": 11}
    if guided:
        options |= {"guidance_scale": 3.0, "negative_prompt_embeds": text(seed=6)}
    if first:
        options["image"] = image()
    take = Session(tiny_wan(vae=True, timesteps=(1000,)), policy, **options)
    for _ in range(4):
        next(take)
    if pending:
        take.set_prompt_embeds(text(takes, seed=77))
    take.snapshot(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = Session.restore(path, tiny_wan(vae=True, timesteps=(1000,)))
    for _ in range(3):
        ours, theirs = next(take), next(other)
        assert torch.equal(ours.latents, theirs.latents)
        assert ours.frames is theirs.frames is None or torch.equal(ours.frames, theirs.frames)
        assert ours.stats.attended_tokens == theirs.stats.attended_tokens
    assert (other.index, other.frame, other.lockstep) == (take.index, take.frame, take.lockstep)


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_restored_take_goes_on_as_if_never_stopped(name, mix, tmp_path):
    assert_restored_take_goes_on(small(name), mix, decode=mix == MIXES[3], path=tmp_path / "take.safetensors")


@pytest.mark.parametrize("mix", itertools.product(("resident", "scratch"), *[(False, True)] * 3, (1, 2)), ids=str)
def test_a_restored_window_goes_on_in_every_combination(mix, tmp_path):
    policy = SlidingWindow(8, sink=2, positions="slots")  # cuts blocks apart
    assert_restored_take_goes_on(policy, mix, decode=False, path=tmp_path / "take.safetensors")


@pytest.mark.parametrize("policy", [FullHistory(), SlidingWindow(9, sink=3)], ids=repr)
def test_a_restored_alias_take_goes_on_as_if_never_stopped(policy, tmp_path):
    take = Session(tiny_wan(), policy, prompt_embeds=text(), residency="alias", decode=False)
    latents_of(take, 4)
    take.snapshot(tmp_path / "take.safetensors")
    other = Session.restore(tmp_path / "take.safetensors", tiny_wan())
    assert torch.equal(latents_of(other, 3), latents_of(take, 3))


@pytest.mark.parametrize("after", [0, 1])
def test_a_snapshot_may_be_taken_before_and_right_after_the_first_chunk(after, tmp_path):
    host = tiny_wan(vae=True)
    take = Session(host, prompt_embeds=text(), image=image())
    ahead = [next(take) for _ in range(after)]
    assert len(ahead) == after
    take.snapshot(tmp_path / "s")
    other = Session.restore(tmp_path / "s", host)
    for _ in range(2):
        ours, theirs = next(take), next(other)
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.frames, theirs.frames)


PARTS = ["history/cond/k", "history/cond/v", "history/cond/base", "history/cond/step", "rng/0", "text/cond", "decoder/"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_snapshot_matters(part, tmp_path):
    """A continuation that ignored one of them would not have noticed that it was spoilt."""
    take = Session(tiny_wan(vae=True), SlidingWindow(9, sink=3, positions="slots"), prompt_embeds=text())
    for _ in range(4):
        next(take)
    take.snapshot(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    assert {name.split("/")[0] for name in tensors} == {"history", "rng", "text", "decoder"}
    for name in [name for name in tensors if name.startswith(part)]:
        other = torch.Generator().manual_seed(99).get_state() if part == "rng/0" else tensors[name] * 0.5
        tensors[name] = other
    save_file(tensors, tmp_path / "s", metadata)
    sound, spoilt = next(take), next(Session.restore(tmp_path / "s", tiny_wan(vae=True)))
    if part == "decoder/":
        assert torch.equal(sound.latents, spoilt.latents) and not torch.equal(sound.frames, spoilt.frames)
    else:
        assert not torch.allclose(sound.latents, spoilt.latents, atol=1e-4)


def pipeline(seed: int = 0) -> WanPipeline:
    host = tiny_wan(seed=seed, vae=True)
    host.release()
    return WanPipeline(
        tokenizer=None, text_encoder=None, transformer=host.transformer, vae=host.vae,
        scheduler=UniPCMultistepScheduler(flow_shift=3.0),
    )  # fmt: skip


def video(pipe: WanPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text(), negative_prompt_embeds=text(seed=5), height=32, width=48, num_frames=9,
        num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames  # fmt: skip


def test_a_pipeline_gives_the_same_video_before_during_and_after_a_session():
    pipe = pipeline()
    before = video(pipe)
    weights = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    host = load(pipe, causal=True)
    take = Session(host, prompt_embeds=text(), height=32, width=48)
    first = next(take).latents
    assert torch.equal(video(pipe), before)  # between two chunks, nothing released
    second = next(take).latents
    host.release()
    assert torch.equal(video(pipe), before)
    assert all("Causal" not in type(p).__name__ for p in pipe.transformer.attn_processors.values())
    assert all(torch.equal(v, weights[k]) for k, v in pipe.transformer.state_dict().items())
    again = Session(load(pipe, causal=True), prompt_embeds=text(), height=32, width=48)
    assert torch.equal(next(again).latents, first) and torch.equal(next(again).latents, second)


def test_a_released_host_refuses_to_go_on_instead_of_forgetting_its_past():
    host = tiny_wan()
    take = Session(host, prompt_embeds=text(), decode=False)
    next(take)
    host.release()
    with pytest.raises(LongtakeError, match="released"):
        next(take)


# --- residencies agree (equivalence 7) --------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_resident_and_scratch_views_agree(name, situation):
    host = tiny_wan(vae=True)
    options = {"prompt_embeds": text(), **SITUATIONS[situation]}
    takes = [Session(host, small(name), residency=r, decode=False, **options) for r in ("resident", "scratch")]
    for _ in range(6):
        torch.testing.assert_close(*(next(take).latents for take in takes), **CLOSE)


@pytest.mark.parametrize(
    ("policy", "situation"),
    [(FullHistory(), s) for s in SITUATIONS]
    + [(SlidingWindow(9, sink=3), s) for s in ("plain", "guidance", "lockstep")],
    ids=lambda x: x if isinstance(x, str) else repr(x),
)
def test_the_alias_view_agrees_where_nothing_moves(policy, situation):
    host = tiny_wan(vae=True)
    options = {"prompt_embeds": text(), **SITUATIONS[situation]}
    takes = [Session(host, policy, residency=r, decode=False, **options) for r in ("resident", "alias")]
    for _ in range(6):
        torch.testing.assert_close(*(next(take).latents for take in takes), **CLOSE)


@pytest.mark.parametrize(
    ("policy", "options"),
    [(SlidingWindow(9, sink=3, positions="slots"), {}), (SlidingWindow(9, sink=3), {"image": image()})],
    ids=["moves", "scatters"],
)
def test_the_alias_view_refuses_what_it_cannot_show(policy, options):
    """Kept frames that move; and a chunk whose rows lie apart because the first image shifted all blocks by one."""
    take = Session(tiny_wan(vae=True), policy, prompt_embeds=text(), residency="alias", decode=False, **options)
    with pytest.raises(LongtakeError, match="alias") as error:
        for _ in range(6):
            next(take)
    assert "resident" in str(error.value) and "\n" not in str(error.value)
