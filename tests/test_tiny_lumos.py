"""tiny-lumos: what it is trained on is true, what it is taught is what a take does, and its folder is a model."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

import longtake
from longtake import FullHistory, Session
from longtake.cli import app
from longtake.hosts.base import HostConfig
from longtake.hosts.lumos import Lumos
from longtake.hosts.lumos.fsq import FSQ
from longtake.hosts.lumos.sequence import FIXED, MASKED, frame_ids, header
from longtake.rope import mm_rope_table
from longtake.samplers.masked import history_pattern
from longtake.zoo import (
    lanes,
    tiny_lumos,
    tiny_lumos_clips,
    tiny_lumos_learning,
    tiny_lumos_tokenizer,
    train_tiny_lumos,
)
from longtake.zoo.stages import Stage
from longtake.zoo.tiny_lumos import GEOMETRY, WORDS

N = GEOMETRY.tokens_per_frame
CODES = math.prod(tiny_lumos_tokenizer.LEVELS)


def rough(model):
    """With weights away from where they were initialised, so that attention and text make a difference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return rough(tiny_lumos.build()).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return rough(tiny_lumos_tokenizer.build()).requires_grad_(False)


@pytest.fixture(scope="module")
def library(tokenizer):
    shelf = tiny_lumos_clips.Library(tokenizer, seed=0)
    shelf.grow(4)
    return shelf


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Trained for seconds."""
    out = tmp_path_factory.mktemp("tiny-lumos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_lumos, "FIRST_FILMS", 3)
        train_tiny_lumos.train(out, {"tokenizer": 0.01, "transformer": 0.03})
    return out


def window_of(codes: torch.Tensor, shapes=("ball", "square"), learn: int | None = None) -> tiny_lumos_clips.Window:
    return tiny_lumos_clips.Window(codes, codes < 0, shapes, tuple(range(len(codes))), learn or len(codes))


# --- what it is trained on ------------------------------------------------------------------------------------------


def test_the_strips_of_one_film_are_the_codes_of_its_frames(tokenizer):
    shelf = tiny_lumos_clips.Library(tokenizer, seed=1)
    shelf.grow(1)  # the first film is of the kind "start"
    rng = np.random.default_rng([1, 6, 0])
    scene = lanes.scene(int(rng.integers(1 << 40)), tiny_lumos_clips.HORIZON + 16, tiny_lumos_clips.GAPS)
    frames = tiny_lumos_clips.WINDOW
    codes = tiny_lumos_tokenizer.encode(tokenizer, scene.render(lanes.STRIDE * (frames - 1) + 1)[None])[0]
    dealt = torch.cat([strips[0].codes for strips in shelf.shelf["start"]], 1)
    assert torch.equal(dealt.long(), codes) and codes.shape == (8, 16, 16)
    assert [strips[0].shape for strips in shelf.shelf["start"]] == [lane and lane.shape for lane in scene.lanes]


def test_the_frames_of_a_strip_are_those_it_says(tokenizer):
    """Whatever a lane's own times, its strip is what encoding the lane from the beginning gives there."""
    shelf = tiny_lumos_clips.Library(tokenizer, seed=2)
    shelf.grow(3)  # the third film is sparse
    rng = np.random.default_rng([2, 6, 2])
    scene = lanes.scene(int(rng.integers(1 << 40)), tiny_lumos_clips.HORIZON + 16, tiny_lumos_clips.GAPS)
    where = next(i for i, lane in enumerate(scene.lanes) if lane)
    strip = shelf.shelf["sparse"][where][0]
    assert strip.times[0] == 0 and strip.times[2] == strip.times[1] + 1
    assert list(strip.times[3:]) == list(range(strip.times[3], strip.times[3] + 5))
    rows = slice(where * lanes.LANE + 8, (where + 1) * lanes.LANE - 8)
    for piece, t in enumerate(strip.times):
        video = scene.render(1, lanes.STRIDE * t)
        seen = (np.abs(video[0, rows, : lanes.TRACK].astype(float) - lanes.WALLS[scene.walls[where]]).max(-1) > 30).any(
            0
        )
        lane = scene.lanes[where]
        seen[lane.post : lane.post + lanes.PILLAR] = False
        assert seen.any() == bool(strip.actors[piece].any())
        if seen.any():
            cells = np.flatnonzero(strip.actors[piece].any(0)) * 8 + 4
            assert cells.min() - 12 <= np.flatnonzero(seen).mean() <= cells.max() + 12


def test_windows_of_a_batch_have_captions_of_equal_length(library):
    words = tiny_lumos.text_tokenizer()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        windows = library.draw(rng, 3)
        assert len({tuple(w.codes.shape) for w in windows}) == 1 and windows[0].codes.max() < CODES
        text = tiny_lumos.prompts(windows, words, rng)
        assert len(text) == 3 and (text[:, -3] == WORDS.video_begin).all()


def test_a_window_is_learnt_only_where_it_has_its_history(library):
    rng = np.random.default_rng(0)
    seen = {w.learn for _ in range(40) for w in library.draw(rng, 1)}
    assert seen == set(tiny_lumos_clips.LEARN.values())
    short = [library.draw(rng, 1, 5)[0] for _ in range(20)]
    assert {w.learn for w in short} == {5, 4} and all(len(w.codes) == len(w.frames) == 5 for w in short)


# --- what it is taught ----------------------------------------------------------------------------------------------


def test_a_training_pass_sees_what_a_take_sees(model):
    """The hidden states of a window's last frame are those of the session's first step after the same frames."""
    config = HostConfig(
        host="lumos", causal=True, sampler="masked", chunk_frames=1, steps=2, fps=lanes.FPS, height=lanes.SIZE,
        width=lanes.SIZE, text_tokens=tiny_lumos.TEXT_TOKENS, history_mask=tiny_lumos.FLOOR, training_frames=8,
    )  # fmt: skip
    host = Lumos(model, config, tokenizer=tiny_lumos.text_tokenizer())
    codes = torch.randint(CODES, (4, 16, 16), generator=torch.Generator().manual_seed(0))
    take = Session(host, FullHistory(), prompt="a ball and a square", decode=False, chunks=4)
    take.extend(codes[None, None, :3])
    passes = []
    forward = host.forward
    host.forward = lambda *given: passes.append(forward(*given)) or passes[-1]  # type: ignore[method-assign]
    next(take)

    content = torch.nn.functional.pad(codes, (0, 1), value=FIXED).flatten(1)
    content[:3, history_pattern(content.shape[1], tiny_lumos.FLOOR)] = MASKED
    content[3] = torch.where(content[3] == FIXED, FIXED, MASKED)
    text = host.encode_prompt(["a ball and a square"], GEOMETRY, 4)
    ids = torch.cat((text, frame_ids(content.view(4, 1, 1, 16, 17), GEOMETRY, WORDS).view(1, -1)), 1)
    rotary = mm_rope_table(model.config.head_dim, model.config.rope_theta)
    phases = rotary.phases(tiny_lumos._positions(text.shape[1], (0, 1, 2, 3)))[None, :, None]
    layer = tiny_lumos.FrameCausal(rotary, phases, text.shape[1], N)
    hidden = model(ids, [layer] * model.config.num_hidden_layers)[:, -N:][:, 3:-1]
    assert torch.allclose(hidden, passes[0], atol=2e-4)
    assert not torch.allclose(hidden[:, :17], hidden[:, 17:34], atol=1e-2)


def test_prompts_are_those_of_the_host_but_for_the_seconds(model):
    host = Lumos(model, HostConfig(host="lumos", fps=lanes.FPS, height=128, width=128, text_tokens=24),
                 tokenizer=tiny_lumos.text_tokenizer())  # fmt: skip
    windows = [window_of(torch.zeros(8, 16, 16, dtype=torch.long))]
    taught = [tiny_lumos.prompts(windows, host.tokenizer, np.random.default_rng(s))[0].tolist() for s in range(60)]
    asked = host.encode_prompt(["a ball and a square"], GEOMETRY, 8)[0].tolist()
    assert any(row[:-2] == asked[:-2] and row[-1] == asked[-1] for row in taught)
    assert len({row[-2] for row in taught}) > 20
    assert min(map(len, taught)) == len(header(1, 16, WORDS))  # some without text


def test_a_window_is_masked_as_a_tube_and_only_masked_codes_are_learnt(model, monkeypatch):
    fed = []
    monkeypatch.setattr(tiny_lumos, "tube_mask", lambda content, rng: torch.arange(content) % 4 > 0)
    monkeypatch.setattr(tiny_lumos, "SLIPS", 0.0)
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, layers: fed.append(ids) or forward(self, ids, layers))
    codes = torch.randint(CODES, (3, 16, 16), generator=torch.Generator().manual_seed(0))

    def loss(codes):
        return tiny_lumos.loss_of(
            model, [window_of(codes)], tiny_lumos.text_tokenizer(), np.random.default_rng(1)
        )[0]  # fmt: skip

    value = loss(codes)
    content = fed[0][0, -3 * N :].view(3, N)[:, 3:-1]
    tube = torch.arange(272) % 4 > 0
    assert (content[:, tube] == WORDS.mask).all() and not (content[:, ~tube] == WORDS.mask).any()
    other = codes.flatten(1).clone()
    hidden = tube.view(16, 17)[:, :16].flatten()
    assert torch.equal(other[:, ~hidden] + WORDS.visual, content.view(3, 16, 17)[:, :, :16].flatten(1)[:, ~hidden])
    other[:, hidden] = (other[:, hidden] + 1) % CODES
    assert not torch.isclose(loss(other.view(3, 16, 16)), value, atol=1e-6)
    assert torch.equal(fed[0], fed[1]), "a target was shown"


def test_the_masked_part_is_never_below_the_floor():
    rng = np.random.default_rng(0)
    parts = torch.stack([tiny_lumos.tube_mask(272, rng) for _ in range(300)]).float().mean(1)
    assert parts.min() == round(272 * tiny_lumos.FLOOR) / 272 and parts.max() > 0.99
    assert (parts == parts.min()).float().mean() == pytest.approx(1 / 3, abs=0.08)


def test_slips_are_few_and_only_in_what_is_shown():
    codes = torch.arange(2 * 8 * 256).view(2, 8, 16, 16)
    changed = [
        (tiny_lumos.slips(codes, np.random.default_rng(s)) != codes).flatten(1).float().mean(1) for s in range(40)
    ]
    share = torch.cat(changed)
    assert 0.3 < (share == 0).float().mean() < 0.7 and 0 < share.max() < 1.5 * tiny_lumos.SLIPS
    assert torch.equal(codes, torch.arange(2 * 8 * 256).view(2, 8, 16, 16))


def test_shared_digits_are_merged_without_a_trace():
    model = rough(tiny_lumos.build())
    names, x = set(model.state_dict()), torch.randn(2, 5, 128)
    tiny_lumos.share_digits(model)
    table = model.model.embed_tokens.parametrizations.weight[0].table
    weight, logits = model.model.embed_tokens.weight.clone(), model.logits(x)
    fsq = FSQ(tiny_lumos_tokenizer.LEVELS)
    own = model.model.embed_tokens.parametrizations.weight.original[WORDS.visual + 77]
    row = own + sum(table[sum(fsq.levels[:i]) + d] for i, d in enumerate(fsq.digits(torch.tensor(77)).tolist()))
    assert torch.allclose(weight[WORDS.visual + 77], row, atol=1e-6)
    tiny_lumos.merge_digits(model)
    assert set(model.state_dict()) == names
    assert torch.equal(model.model.embed_tokens.weight, weight) and torch.equal(model.logits(x), logits)


def test_a_window_can_be_learnt(library):
    torch.manual_seed(0)
    model = tiny_lumos.build()
    tiny_lumos.share_digits(model)
    learn = [o for make in [tiny_lumos_learning.optimizers(model, tiny_lumos.OUTER, 3e-3)]
             for o in make(list(model.parameters()))]  # fmt: skip
    words, windows = tiny_lumos.text_tokenizer(), library.draw(np.random.default_rng(0), 1, 5)
    losses = []
    for seed in range(25):
        loss, numbers = tiny_lumos.loss_of(model, windows, words, np.random.default_rng(seed))
        losses.append(numbers["nats"])
        for optimizer in learn:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in learn:
            optimizer.step()
    assert losses[0] == pytest.approx(math.log(CODES), abs=0.5)
    assert np.mean(losses[-3:]) < losses[0] - 1.0, losses


# --- its tokenizer --------------------------------------------------------------------------------------------------


def test_dirt_moves_digits_by_one_and_leaves_codes():
    fsq = FSQ(tiny_lumos_tokenizer.LEVELS)
    values = fsq.values(torch.arange(CODES)).T.reshape(1, 4, 1, 1, CODES)
    torch.manual_seed(0)
    dirt = tiny_lumos_tokenizer.dirty(values, fsq.levels, 0.5)
    moved = (fsq.digits(fsq.nearest(dirt.movedim(1, -1))) - fsq.digits(torch.arange(CODES))).abs()
    assert moved.max() == 1 and 0.3 < (moved > 0).float().mean() < 0.5
    assert torch.allclose(fsq.values(fsq.nearest(dirt.movedim(1, -1))).movedim(-1, 1), dirt, atol=1e-6)
    assert torch.equal(tiny_lumos_tokenizer.dirty(values, fsq.levels, 0.0), values)


def test_clips_weigh_what_moves_and_hold_whole_latent_frames():
    pixels, weight = tiny_lumos_tokenizer._clips(np.random.default_rng(0), 9, 6, "cpu")
    assert pixels.shape == (6, 3, 9, 64, 64) and set(weight.unique().tolist()) == {1.0, 5.0}
    for first in (1, 5):  # all but the clock, which has every crop's corner at most, stands still in a latent frame
        still = (pixels[:, :, first] == pixels[:, :, first + 3]).all(1).flatten(1).float().mean(1)
        assert still.min() > 0.9
    changes = (pixels[:, :, 4] != pixels[:, :, 5]).any(1).flatten(1).float().mean(1)
    assert changes.max() > 0.01


def test_muon_learns_the_inner_matrices_alone(tokenizer):
    module = tiny_lumos_tokenizer.build()
    muon, adam = tiny_lumos_learning.optimizers(module, tiny_lumos_tokenizer.OUTER, 1e-3)(list(module.parameters()))
    inner = {id(p) for group in muon.param_groups for p in group["params"]}
    outer = {id(p) for group in adam.param_groups for p in group["params"]}
    assert not inner & outer and len(inner) + len(outer) == len(list(module.parameters()))
    for name, p in module.named_parameters():
        assert (id(p) in inner) == (p.ndim == 5 and "enter" not in name and "leave" not in name), name


def test_minutes_are_those_the_training_had_of_the_machine(tmp_path):
    stage = Stage("toy", tmp_path, {"net": torch.nn.Linear(2, 2)}, 1.0, 1e-3)
    begun, own = time.monotonic(), time.thread_time()
    for turn, _ in enumerate(stage):
        time.sleep(0.05)  # somebody else's turn
        if turn == 10:
            break
    assert stage.used <= time.thread_time() - own + 1e-3 < 0.5 * (time.monotonic() - begun)
    assert stage.used >= 0


# --- its folder -----------------------------------------------------------------------------------------------------


def test_a_trained_folder_is_small_complete_and_described(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and "work" not in p.relative_to(folder).parts]
    assert sum(p.stat().st_size for p in files) <= 6 * 2**20
    names = {str(p.relative_to(folder)) for p in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "longtake.json", "training.json",
            "video_tokenizer/config.json"} <= names  # fmt: skip
    about = json.loads((folder / "longtake.json").read_text())
    assert (about["host"], about["causal"], about["sampler"], about["chunk_frames"]) == ("lumos", True, "masked", 1)
    assert about["world"] == "lanes" and about["history_mask"] == tiny_lumos.FLOOR and len(about["prompts"]) == 3
    facts = json.loads((folder / "training.json").read_text())
    assert facts["seed"] == 0 and set(facts["final"]) == {"tokenizer", "transformer"}


def test_a_trained_folder_knows_the_words_of_captions(folder):
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    known = words("A Ball, a circle and a diamond.", add_special_tokens=False).input_ids
    assert words.unk_token_id not in known and known[0] == known[2]
    assert all(tiny_lumos.FIRST_WORD <= i < WORDS.visual and i not in WORDS for i in known)
    assert words.unk_token_id in words("a red zebra").input_ids


def test_a_trained_folder_makes_video_from_text_and_from_a_first_image(folder):
    model = longtake.load(folder, device="cpu")
    made = {}
    for image in (None, torch.from_numpy(lanes.sample(5, 1)[0][0]).permute(2, 0, 1) / 127.5 - 1.0):
        take = Session(model, prompt="a ball and a square", image=image, seed=1, num_inference_steps=2, chunks=3)
        frames = np.concatenate([chunk.frames for chunk in take])
        assert frames.dtype == np.uint8 and frames.shape[1:] == (128, 128, 3)
        made[image is None] = frames
    assert len(made[True]) == 9
    assert not np.array_equal(made[True][:1], made[False][:1])


def test_the_command_makes_video_with_a_trained_folder(folder, tmp_path):
    Image.fromarray(lanes.sample(5, 1)[0][0]).save(tmp_path / "first.png")
    for extra in ((), ("--image", str(tmp_path / "first.png"))):
        out = tmp_path / "a.mp4"
        result = CliRunner().invoke(
            app, ["generate", "a ball and a square", "--model", str(folder), "--device", "cpu", "-o", str(out),
                  "--chunks", "3", "--steps", "2", *extra],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert out.stat().st_size > 0
        out.unlink()


def test_a_training_that_has_used_its_minutes_is_not_trained_again(folder, monkeypatch):
    monkeypatch.setattr(tiny_lumos, "FIRST_FILMS", 3)
    before = json.loads((folder / "training.json").read_text())["final"]
    weights = (folder / "model.safetensors").read_bytes()
    after = train_tiny_lumos.train(folder, {"tokenizer": 0.01, "transformer": 0.03})
    assert {name: row["step"] for name, row in after["final"].items()} == {n: r["step"] for n, r in before.items()}
    assert (folder / "model.safetensors").read_bytes() == weights


def test_another_training_begins_with_this_ones_tokenizer_and_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_lumos, "FIRST_FILMS", 3)
    monkeypatch.setattr(tiny_lumos, "RATE", 0.0)
    train_tiny_lumos.train(tmp_path, {"tokenizer": 0.01, "transformer": 0.01}, begin=folder)
    part = Path("video_tokenizer") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / part).read_bytes() == (folder / part).read_bytes()
    first, second = longtake.load(folder, device="cpu"), longtake.load(tmp_path, device="cpu")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_the_command_refuses_what_cannot_work_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (("--tokenizer-minutes", "0"), "--tokenizer-minutes 0"),
        (("--transformer-minutes", "nan"), "--transformer-minutes nan"),
        (("--batch", "0"), "--batch 0"),
        (("--begin", "nowhere"), "nowhere is no finished training"),
    ):
        result = CliRunner().invoke(app, ["train", "tiny-lumos", "--out", "m", *arguments])
        assert result.exit_code == 2 and words in result.stderr, result.output


# --- the weights that come with it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return longtake.load("tiny-lumos")


def test_the_embedded_weights_know_scenery_they_never_saw(embedded):
    """Half a frame and more is masked; an even guess costs 7.56 nats a code."""
    shelf = tiny_lumos_clips.Library(embedded.codec, seed=1 << 30)
    shelf.grow(3)
    rng = np.random.default_rng(0)
    words = tiny_lumos.text_tokenizer()
    cost = lambda model: tiny_lumos.loss_of(model, shelf.draw(np.random.default_rng(1), 2), words, rng)[1]["nats"]
    with torch.no_grad():
        assert cost(embedded.model) < 4 < 7 < cost(tiny_lumos.build())


def test_the_embedded_model_packs_its_past_behind_a_first_image(embedded):
    """Under 6 MB; a take from an image shows it, and holds what four frames hold."""
    folder = Path(longtake.__file__).parent / "zoo" / "tiny-lumos"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 6_000_000
    video, prompt = lanes.sample(5, 1)
    image = torch.from_numpy(video[0]).permute(2, 0, 1) / 127.5 - 1
    take = Session(
        embedded, prompt=prompt, image=image, policy=longtake.PackCache(), chunks=9,
        sampler=longtake.MaskedSampler(steps=4, history_mask=0.5),
    )  # fmt: skip
    sizes = []
    for chunk in take:
        if not sizes:
            error = (chunk.frames[0].cpu().numpy().astype(float) - video[0]) / 255
            assert -10 * np.log10(np.mean(error**2)) > 20, "the image, as its codes have it"
        sizes.append(chunk.stats.history_bytes)
    assert sizes[1] < sizes[-4] == sizes[-3] == sizes[-2], "the last frame is not kept, nobody looks at it"
