"""A model that draws codes is compared on the world of lanes as one that denoises is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import longtake
from longtake import FullHistory, SlidingWindow
from longtake.evaluate.compare import arms as names
from longtake.evaluate.compare import runner
from longtake.evaluate.compare.arms import Arm, controls
from longtake.evaluate.compare.cells import Store, fingerprint
from longtake.evaluate.compare.footage import Footage, has_codec, probes
from longtake.evaluate.compare.matrix import Matrix
from longtake.evaluate.compare.protocols import Setting, ahead, fork, run
from longtake.evaluate.compare.takes import replayed
from longtake.zoo import lanes, tiny_lumos, tiny_lumos_tokenizer, train_tiny_lumos

QUICK = Setting("A", frames=7, gaps=(1,), free=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-lumos with random weights."""
    out = tmp_path_factory.mktemp("lumos")
    torch.manual_seed(0)
    train_tiny_lumos.save_tokenizer(out, tiny_lumos_tokenizer.build())
    train_tiny_lumos.export(out, tiny_lumos.build(), tiny_lumos.text_tokenizer(), {})
    config = json.loads((out / "longtake.json").read_text())
    (out / "longtake.json").write_text(json.dumps({**config, "steps": 1}))
    return out


@pytest.fixture(scope="module")
def host(folder):
    return longtake.load(folder, device="cpu")


def test_an_actor_has_time_to_be_seen_whatever_the_chunk():
    assert [ahead(chunk) for chunk in (1, 2, 3, 5, 6)] == [6, 3, 2, 2, 2]


def test_true_frames_are_codes_and_a_branch_draws_its_own(host):
    footage = Footage(host, 0, 7, (1,))
    codes = footage.latents(4)
    assert codes.dtype == torch.int64 and codes.shape == (1, 1, 4, 16, 16) and has_codec(host)
    assert footage.pixels(0, codes).shape == (13, lanes.SIZE, lanes.SIZE, 3)
    take = longtake.Session(host, SlidingWindow(3, sink=1), prompt="a ball", decode=False, chunks=6)
    take.extend(codes[:, :, :3])
    one, same, other = (torch.cat([c.latents for c in fork(take, seed, 2)], 1) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other) and take.index == 3


def test_a_cell_of_every_protocol_comes_out(host):
    scene = next(s for s in range(50) if run_events(host, s))
    footage = Footage(host, scene, QUICK.length(host), QUICK.gaps)
    shape = runner.shape_of(host)
    full = run(Arm("full", FullHistory()), footage, QUICK)
    truth = run(Arm(names.TRUTH, None, names.TRUTH), footage, QUICK)
    alone = run(next(arm for arm in controls(shape, 8) if arm.name == names.NO_HISTORY), footage, QUICK)
    assert [e["gap"] for e in full["events"]] == [e["gap"] for e in truth["events"]] and full["events"]
    assert full["attended_tokens"] > alone["attended_tokens"] > shape.chunk_tokens, "the prompt is always seen"
    free = replace(QUICK, protocol="B", frames=2)
    course = run(Arm("window", SlidingWindow(3, sink=1)), Footage(host, scene, free.length(host), (1,)), free)
    assert course["chunks"] == 6 and np.isfinite(course["background_ssim"])


def run_events(host, seed: int) -> bool:
    """Whether somebody returns in time."""
    return len(probes(lanes.scene((1 << 41) + seed, QUICK.length(host) + 16, QUICK.gaps), 7, 1)) == 1


def test_free_takes_of_codes_are_kept_exactly(folder, host, tmp_path):
    matrix = Matrix(prompts=("a ball",), chunks=(2,), height=32, width=32, policies=("window:frames=3,sink=1",))
    plan = runner.Plan((str(folder),), settings=(), device="cpu", takes=matrix)
    todo, store = runner.cells(plan, []), Store(tmp_path)
    assert runner.execute(plan, todo, store, tmp_path) == []
    take = longtake.Session(
        host, SlidingWindow(3, sink=1), prompt="a ball", seed=0, height=32, width=32, chunks=2
    )  # fmt: skip
    frames = np.concatenate([chunk.frames.numpy() for chunk in take])
    assert np.array_equal(np.concatenate(list(replayed(host, store.files(todo[0])))), frames)


def test_weights_in_a_layout_of_their_own_are_told_apart(folder):
    before = fingerprint(folder)
    (folder / "training.json").write_text("{}")
    assert fingerprint(folder) == before
    kept = (folder / "longtake.json").read_text()
    (folder / "longtake.json").write_text(kept + " ")
    assert fingerprint(folder) != before
    (folder / "longtake.json").write_text(kept)
