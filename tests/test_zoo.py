"""The world of shapes tells the truth, and the embedded model really draws what it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from longtake.errors import LongtakeError
from longtake.zoo import causal, stages, tiny_text, tiny_transformer, tiny_vae, world

FOLDER = Path(tiny_vae.__file__).parent / "tiny-shapes"
FRESH = 1 << 40  # training draws its seeds below 2 ** 30


def areas(frame: np.ndarray) -> dict[str, int]:
    """Pixels of a frame [H, W, 3] that are clearly of each colour of the world's shapes."""
    palette = {**world.COLOURS, **{f"{k} top": v for k, (_, v, _) in world.BACKGROUNDS.items()}}
    palette |= {f"{k} bottom": v for k, (_, _, v) in world.BACKGROUNDS.items()}
    distance = np.stack([np.linalg.norm(frame - np.float32(rgb), axis=-1) for rgb in palette.values()])
    nearest, close = distance.argmin(0), distance.min(0) < 60
    return {name: int((close & (nearest == i)).sum()) for i, name in enumerate(palette) if name in world.COLOURS}


def centre(frame: np.ndarray, colour: str) -> np.ndarray:
    """Mean (x, y) of the pixels of a colour."""
    near = np.linalg.norm(frame - np.float32(world.COLOURS[colour]), axis=-1) < 80
    return np.argwhere(near).mean(0)[::-1] if near.any() else np.array([np.nan, np.nan])


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    torch.set_num_threads(1)
    return WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32, local_files_only=True)


def roll(pipe: WanPipeline, prompts: list[str], chunks: int, seed: int) -> np.ndarray:
    """Frames [B, T, H, W, 3] of a rollout with a plain loop."""
    with torch.no_grad():
        text = tiny_text.embed(pipe.tokenizer, pipe.text_encoder, prompts)
    return tiny_vae.decode(pipe.vae, tiny_transformer.sample(pipe.transformer, text, chunks, seed, size=8))


def test_same_seed_same_video_and_other_seed_other_video():
    first, caption = world.sample(5, 12)
    again, same = world.sample(5, 12)
    assert first.dtype == np.uint8 and first.shape == (12, 64, 64, 3)
    assert np.array_equal(first, again) and caption == same
    assert not np.array_equal(first, world.sample(6, 12)[0])


def test_a_scene_can_be_entered_anywhere_and_never_ends():
    long, _ = world.sample(3, 40)
    assert np.array_equal(world.sample(3, 10, start=30)[0], long[30:])
    late, caption = world.sample(3, 2, start=10**7)
    colours = [word for word in caption.split() if word in world.COLOURS and f"{word} background" not in caption]
    assert all(areas(late[0])[colour] > 40 for colour in colours)


def test_captions_name_exactly_the_colours_that_are_visible():
    for seed in range(60):
        scene = world.scene(seed)
        named = {actor.colour for actor in scene.actors}
        seen = np.mean([list(areas(frame).values()) for frame in scene.render(60)[::6]], axis=0)
        for colour, pixels in zip(world.COLOURS, seen, strict=True):
            if colour in named:
                assert pixels > 40, (scene.caption, colour)
                assert colour in scene.caption
            else:
                assert pixels < 30, (scene.caption, colour)


def test_captions_name_the_shape_and_the_background():
    for seed in range(80):
        scene = world.scene(seed)
        frame = scene.render(1)[0].astype(np.float32)
        words, top, bottom = world.BACKGROUNDS[scene.background]
        assert words in scene.caption and scene.motion in scene.caption
        empty = np.float32(top)[None] + np.linspace(0, 1, 64)[:, None] * (np.float32(bottom) - np.float32(top))
        drawn = np.abs(frame - empty[:, None]).max(-1) > 60
        if len(scene.actors) == 2:
            continue
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        box = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        hollow = not box[box.shape[0] // 2, box.shape[1] // 2]
        fill = box.mean()
        shape = "ring" if hollow else "square" if fill > 0.93 else "ball" if fill > 0.65 else "triangle"
        assert f"a {scene.actors[0].colour} {shape} " in scene.caption, (scene.caption, fill)


def test_a_world_without_frames_is_refused():
    with pytest.raises(LongtakeError, match="at least one frame"):
        world.sample(0, 0)


def test_chunks_at_once_equal_chunks_one_by_one():
    torch.manual_seed(0)
    model = tiny_transformer.build(4).eval()
    clean, noisy = torch.randn(2, 2, 4, 12, 8, 8).unbind()
    times = torch.tensor([[1000.0, 937.5, 625.0, 300.0]] * 2)
    text, frames = torch.randn(2, 8, 64), torch.arange(12).expand(2, -1)
    with torch.no_grad():
        whole = causal.velocity(model, clean, noisy, times, text, frames)
        rollout = causal.Rollout(model, [1000.0], window=10**6, sink=0)
        for i in range(4):
            part = slice(3 * i, 3 * i + 3)
            one = rollout._forward(noisy[:, :, part], float(times[0, i]), text, commit=False)
            assert torch.allclose(one, whole[:, :, part], atol=1e-5)
            rollout._forward(clean[:, :, part], 0.0, text, commit=True)
            rollout.done += 3
        last = causal.velocity(model, clean, noisy[:, :, 6:], times[:, 2:], text, frames)
        assert torch.allclose(last, whole[:, :, 6:], atol=1e-5)


def test_a_stopped_stage_goes_on_where_it_was(tmp_path: Path):
    def run(minutes: float) -> stages.Stage:
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 4)
        stage = stages.Stage("toy", tmp_path, {"net": net}, minutes, 1e-2)
        for _ in stage:
            stage.step(net(torch.ones(1, 4)).square().mean())
        return stage

    first = run(0.002)
    second = run(0.004)
    assert second.steps > first.steps and second.used >= 0.004 * 60
    assert run(0.004).steps == second.steps


def test_a_stage_is_gone_on_with_by_what_its_settings_are_not_by_how_they_are_called(tmp_path: Path):
    starts = [tmp_path / name / "work" / "many.pt" for name in ("a", "moved", "b")]
    for start, content in zip(starts, ("one", "one", "two"), strict=True):
        start.parent.mkdir(parents=True)
        start.write_text(content)
    a, moved, b = map(stages.begun_with, starts)
    assert stages.begun_with(None) is None and stages.begun_with(starts[0], starts[0].parent) is None

    def stage(**recipe: object) -> stages.Stage:
        return stages.Stage("toy", tmp_path, {"net": torch.nn.Linear(2, 2)}, 1.0, 1e-2, recipe=recipe)

    stage(seed=0, begin=a).save()
    stage(seed=0, begin=moved)
    with pytest.raises(LongtakeError, match=f"begin={tmp_path}/a, now begin={tmp_path}/b: give another --out"):
        stage(seed=0, begin=b)
    with pytest.raises(LongtakeError, match=r"seed=0, begin=.*, now seed=1, begin=None"):
        stage(seed=1, begin=None)


def test_the_folder_is_small_complete_and_described():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20
    description = json.loads((FOLDER / "longtake.json").read_text())
    assert description["causal"] and description["chunk_frames"] == 3 and len(description["prompts"]) == 3
    assert description["timesteps"] == list(tiny_transformer.TIMESTEPS)
    assert description["text_tokens"] == tiny_text.TEXT_TOKENS
    assert json.loads((FOLDER / "training.json").read_text())["seed"] is not None


def test_the_tokenizer_loads_alone_and_knows_its_words():
    tokens = AutoTokenizer.from_pretrained(FOLDER / "tokenizer", local_files_only=True)
    assert tokens.pad_token_id == 0
    known = tokens("A red Ball, bouncing.").input_ids
    assert tokens.unk_token_id not in known and known[-1] == tokens.eos_token_id
    assert tokens.unk_token_id in tokens("a red zebra").input_ids


def test_stock_diffusers_runs_the_folder(pipe: WanPipeline):
    video = pipe(
        "a red ball moving at night", height=64, width=64, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=tiny_text.TEXT_TOKENS, output_type="np", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert video.shape == (1, 9, 64, 64, 3) and np.isfinite(video).all()


def test_the_autoencoder_keeps_unseen_videos(pipe: WanPipeline):
    whole, end = [], []
    for seed in range(8):
        video, _ = world.sample(FRESH + seed, 65)
        again = tiny_vae.decode(pipe.vae, tiny_vae.encode(pipe.vae, video[None]))[0]
        whole.append(tiny_vae.psnr(again, video))
        end.append(tiny_vae.psnr(again[-16:], video[-16:]))
    assert np.mean(whole) > 23.5 and min(whole) > 19.0, whole
    assert np.mean(end) > np.mean(whole) - 1.0, "long clips wear out"


def test_rollouts_show_moving_shapes_of_the_captioned_colours(pipe: WanPipeline):
    asked = [
        (colour, f"a {colour} {shape} moving {world.BACKGROUNDS[background][0]}")
        for colour, background in (("red", "dark"), ("green", "light"), ("blue", "dark"), ("white", "dark"))
        for shape in ("ball", "square", "triangle")
    ]
    videos = roll(pipe, [prompt for _, prompt in asked], chunks=8, seed=1)
    right, spread = [], []
    for (colour, _), video in zip(asked, videos, strict=True):
        late = video[9::6]  # the first chunk fades in
        counts = [areas(frame) for frame in late]
        right.append(np.mean([count[colour] > 40 and max(count, key=count.get) == colour for count in counts]))
        spread.append(np.nanstd([centre(frame, colour) for frame in late], axis=0).max())
    # Chance is 1 in 6, and an untrained model paints no shape at all.
    assert np.mean(right) > 0.6, dict(zip(asked, right, strict=True))
    assert np.median(spread) > 4.0, spread


def test_the_prompt_decides_the_colour_not_the_seed(pipe: WanPipeline):
    videos = roll(pipe, [f"a {colour} ball moving on a dark background" for colour in ("red", "blue")], 2, seed=3)
    for colour, video in zip(("red", "blue"), videos, strict=True):
        count = areas(video[-1])
        assert max(count, key=count.get) == colour


def test_a_new_prompt_is_obeyed_in_the_middle_of_a_take(pipe: WanPipeline):
    with torch.no_grad():
        text = tiny_text.embed(
            pipe.tokenizer,
            pipe.text_encoder,
            ["a green square moving on a light background", "a red square moving on a light background"],
        )
    noise = torch.Generator().manual_seed(4)
    rollout = causal.Rollout(pipe.transformer, tiny_transformer.warp())
    shape = (1, pipe.vae.config.z_dim, 3, 8, 8)
    parts = [rollout.next(torch.randn(shape, generator=noise), text[int(i > 4)][None], noise) for i in range(10)]
    causal.release(pipe.transformer)
    video = tiny_vae.decode(pipe.vae, torch.cat(parts, 2))[0]
    before, after = (
        sum(np.array([*areas(frame).values()]) for frame in part) for part in (video[9:57:4], video[-36::4])
    )
    assert list(world.COLOURS)[before.argmax()] == "green"
    assert list(world.COLOURS)[after.argmax()] == "red"


def test_a_past_that_the_sampler_made_is_the_rollouts_own_and_the_rest_stays_true():
    torch.manual_seed(0)
    model = tiny_transformer.build(4).eval()
    x, text, frames = torch.randn(1, 4, 12, 4, 4), torch.randn(1, 8, 64), torch.arange(12)[None]
    made = tiny_transformer._rolled(model, x, text, frames, np.random.default_rng(1), 1)
    changed = [not torch.equal(made[:, :, 3 * c : 3 * c + 3], x[:, :, 3 * c : 3 * c + 3]) for c in range(4)]
    assert changed[0] is False and changed[3] is False and any(changed[1:3])
    begin = changed.index(True)
    torch.manual_seed(5)
    made = tiny_transformer._rolled(model, x, text, frames, np.random.default_rng(1), 1)
    torch.manual_seed(5)
    rollout = causal.Rollout(model, tiny_transformer.warp(), window=10**6, sink=0)
    with torch.no_grad():
        for c in range(begin):
            rollout._forward(x[:, :, 3 * c : 3 * c + 3], 0.0, text, commit=True)
            rollout.done += 3
    one = rollout.next(torch.randn(1, 4, 3, 4, 4), text)
    assert torch.allclose(one, made[:, :, 3 * begin : 3 * begin + 3], atol=1e-5)
