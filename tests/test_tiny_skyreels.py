"""tiny-skyreels is trained as it is used: diffusion forcing, on from tiny-wan's many-step stage."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline

from longtake import LongtakeError, Session, load
from longtake.evaluate.compare.footage import FIRST_SEED, true_latents
from longtake.evaluate.compare.picture import psnr
from longtake.history import History
from longtake.hosts.base import HostConfig
from longtake.hosts.loading import embedded
from longtake.hosts.skyreels import SkyReels
from longtake.plan import HistoryShape, Plan
from longtake.policies import FullHistory
from longtake.samplers.stagger import Stagger
from longtake.session import history_shape
from longtake.zoo import forcing, lanes, tiny_text, tiny_transformer, tiny_vae, train_tiny_skyreels

CHUNKS = 3


def transformer(seed: int = 0):
    """An untrained one whose every weight matters."""
    torch.manual_seed(seed)
    model = train_tiny_skyreels.build(tiny_transformer.build(4))
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model.requires_grad_(False).eval()


def window(seed: int = 1):
    torch.manual_seed(seed)
    x, text = torch.randn(2, 4, 3 * CHUNKS, 4, 4), torch.randn(2, 5, 64)
    sigmas = torch.tensor([[0.0, 0.4, 0.9], [0.7, 0.02, 1.0]])
    frames = torch.stack([torch.arange(9), torch.arange(30, 39)])
    return x, sigmas, text, frames


def test_training_computes_what_a_take_computes():
    """Every chunk through the host and the history, one after the other, each with its own noise."""
    x, sigmas, text, frames = window()
    model = transformer()
    trained = forcing.velocity(model, x, sigmas, text, frames)
    forcing.release(model)
    host = SkyReels(model, HostConfig(host="skyreels", causal=True, height=32, width=32, text_tokens=5, fps=16))
    geometry = host.geometry()
    for take in range(2):
        shape = history_shape(host, geometry)
        shape = HistoryShape(**{**shape.__dict__, "frames": 9, "live_chunks": CHUNKS})
        history = History(shape, host.rotary, capacity=FullHistory().capacity(shape))
        said = host.text_state(text[take : take + 1])
        blocks = []
        for i in range(CHUNKS):
            blocks.append(history.admit(3 * i, 3, host.positions(geometry, int(frames[take, 3 * i]), 3), grid=(2, 2)))
            history.apply(Plan())
        for i, block in enumerate(blocks):
            chunk = x[take : take + 1, :, 3 * i : 3 * i + 3]
            layers = history.layers("cond", block, write=True)
            out = host.forward(chunk, 1000 * float(sigmas[take, i]), said, layers)
            torch.testing.assert_close(out, trained[take : take + 1, :, 3 * i : 3 * i + 3], atol=2e-5, rtol=2e-5)


def test_a_chunk_sees_nothing_that_comes_later_and_all_that_came_before():
    x, sigmas, text, frames = window()
    model = transformer()
    before = forcing.velocity(model, x, sigmas, text, frames)
    x[:, :, 3:6] += 1
    after = forcing.velocity(model, x, sigmas, text, frames)
    moved = (after - before).abs().amax((0, 1, 3, 4)).unflatten(0, (CHUNKS, 3)).amax(1)
    assert moved[0] == 0 and moved[1] > 1e-3 and moved[2] > 1e-3


def test_a_moment_of_the_sampler_is_a_staircase_that_ends_clean():
    rng, levels = np.random.default_rng(0), train_tiny_skyreels.levels()
    assert len(levels) == train_tiny_skyreels.STEPS + 1 and levels[0] > 0.99 and levels[-1] == 0
    finished = waiting = 0
    for _ in range(200):
        stairs = forcing.staircase(rng, levels, 7, 10)
        there = stairs[~np.isnan(stairs)]
        assert (np.diff(there) >= 0).all() and (there > 0).any()
        rising = there[there > 0]
        at = [levels.index(level) for level in rising]
        assert all(a - b == 10 for a, b in pairwise(at))
        finished += int((there == 0).any())
        waiting += int(np.isnan(stairs).any())
    assert finished > 50 and waiting > 50
    for _ in range(20):
        assert forcing.draw_sigmas(rng, (3, 7), levels, 5.0).any(1).all()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of tiny-wan leaves behind, untrained."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    tiny_vae.build().save_pretrained(folder / "vae")
    modules = {
        "transformer": tiny_transformer.build(tiny_vae.Z_DIM), "encoder": tiny_text.build(len(tiny_text.tokenizer()))
    }  # fmt: skip
    average = [p.detach().clone() for module in modules.values() for p in module.parameters()]
    (folder / "work").mkdir()
    state = {"modules": {key: m.state_dict() for key, m in modules.items()}, "average": average}
    torch.save(state, folder / "work" / "short-many.pt")
    return folder


def test_training_goes_on_where_it_was_stopped_and_leaves_a_model(begun: Path, tmp_path: Path):
    one = train_tiny_skyreels.train(tmp_path / "m", 1e-9, begun, batch=1, films=1)
    assert one["steps"] == 1
    again = train_tiny_skyreels.train(tmp_path / "m", 1e-9, begun, batch=1, films=1)
    assert again["steps"] == 1  # its minutes are used up
    used = torch.load(tmp_path / "m" / "work" / "forcing.pt", weights_only=True)["used"]
    more = train_tiny_skyreels.train(tmp_path / "m", used / 60 + 1e-9, begun, batch=1, films=1)
    assert more["steps"] == 2 and np.isfinite(more["final"]["loss"])
    rows = [json.loads(line) for line in (tmp_path / "m" / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    host = load(tmp_path / "m")
    assert isinstance(host, SkyReels) and host.config.world == "lanes" and host.config.overlap == 3
    assert str(begun) not in (tmp_path / "m" / "vae" / "config.json").read_text(), "where it was trained is nobody's"
    take = Session(host, prompt="a ball", num_frames=5, num_inference_steps=2, height=16, width=16)
    assert next(take).frames.shape == (5, 16, 16, 3)
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    assert pipe.scheduler.config.flow_shift == host.config.shift


def test_a_folder_without_a_training_is_refused_in_one_line(begun: Path, tmp_path: Path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(LongtakeError, match="longtake train tiny-wan") as caught:
            train_tiny_skyreels.train(tmp_path / "m", 1.0, folder)
        assert "\n" not in str(caught.value)


def test_the_embedded_model_is_small_and_paints_on_where_a_true_scene_ends():
    """Nearer to the truth than its last true frame for ever, in every scene tried."""
    folder = embedded()["tiny-skyreels"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6 * 2**20
    torch.set_num_threads(1)
    host = load("tiny-skyreels", device="cpu")
    for seed in range(2):
        scene = lanes.scene(FIRST_SEED + seed, 37, (1, 2, 4))
        sampler = Stagger(steps=12, lag=3, condition_noise=20.0)
        take = Session(host, prompt=scene.caption, seed=seed, num_frames=57, sampler=sampler)
        take.extend(true_latents(host, scene, 9))
        made = np.concatenate([np.asarray(chunk.frames) for chunk in take])
        truth = scene.render(33 + len(made))
        still = np.broadcast_to(truth[32], made.shape)
        assert psnr(made, truth[33:]) > psnr(still, truth[33:])
