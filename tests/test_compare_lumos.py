"""A model that draws codes is compared on the world of lanes as one that denoises is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import longtake
from longtake import FullHistory, SlidingWindow
from longtake.cli import app
from longtake.evaluate.compare import arms as names
from longtake.evaluate.compare import runner
from longtake.evaluate.compare.arms import Arm, controls
from longtake.evaluate.compare.cells import Store, fingerprint
from longtake.evaluate.compare.footage import Footage, has_codec, probes
from longtake.evaluate.compare.likelihood import RETURNED, Account, nats
from longtake.evaluate.compare.markdown import markdown
from longtake.evaluate.compare.matrix import Matrix
from longtake.evaluate.compare.protocols import Setting, ahead, fork, run
from longtake.evaluate.compare.takes import replayed
from longtake.zoo import lanes, tiny_lumos, tiny_lumos_tokenizer, train_tiny_lumos
from longtake.zoo.tiny_lumos_clips import actors_at

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


class Listening:
    """Noise that hears the log-probabilities of the first draw of a chunk, and draws anything."""

    def codes(self, chunk, step, rows, logp):
        self.rows, self.logp = rows, logp
        return torch.zeros(rows.shape, dtype=torch.int64)

    def gumbel(self, chunk, step, rows):
        return torch.zeros(rows.shape)


def test_what_a_code_costs_is_what_the_sampler_would_draw_it_by(host):
    footage = Footage(host, 0, 7, (1,))
    codes, noise = footage.latents(4), Listening()
    start = lambda: longtake.Session(host, SlidingWindow(3, sink=1), prompt="a ball", decode=False, chunks=6)
    take = start()
    take.extend(codes[:, :, :3])
    costs, attended = nats(fork(take, 0, 1), codes[:, :, 3:4])
    twin = start()
    twin.extend(codes[:, :, :3])
    twin.noise = noise
    assert next(twin).stats.attended_tokens == attended
    slow = -noise.logp.gather(-1, codes[0, 0, 3].flatten()[noise.rows][..., None])[..., 0]
    assert sorted(noise.rows[0].tolist()) == list(range(256))
    assert np.allclose(costs.flatten()[noise.rows[0]], slow[0].numpy(), atol=1e-5)
    assert take.frame == 3 and torch.equal(footage.latents(4), codes), "asking changes nothing"


def test_costs_are_told_apart_by_what_is_seen(host):
    scene = next(s for s in (lanes.scene((1 << 41) + n, 40, (1,)) for n in range(50)) if any(
        lane and len(lane.visits) > 1 and lane.visits[1].start < 20 for lane in s.lanes))  # fmt: skip
    account = Account(scene)
    for frame in range(1, 40):
        account.add(frame, np.full((16, 16), float(frame)))
    told = account.as_dict()
    for event in told["events"]:
        visits = scene.lanes[event["lane"]].visits
        start = visits[event["visit"]].start
        frames = [
            t for t in range(start, min(start + RETURNED, 40)) if actors_at(scene.lanes[event["lane"]], (t,)).any()
        ]
        assert (
            event["nats"] == pytest.approx(np.mean(frames), abs=1e-3)
            and event["gap"] == start - visits[event["visit"] - 1].end
        )
    assert told["events"] and told["seen"] and told["scenery"] == [float(t) for t in range(1, 40)]


def test_likelihoods_are_compared_from_the_command_line(folder, tmp_path):
    out = tmp_path / "run"
    options = ["--protocol", "L", "--frames", "12", "--gap", "1", "--budget", "3", "--seeds", "2"]
    policies = ["-p", "full", "-p", "packcache", "-p", "window:positions=slots"]
    run_ = lambda model: CliRunner().invoke(app, ["compare", "-o", str(out), "-m", model, *policies, *options])
    assert (refused := run_("tiny-wan")).exit_code == 2 and "draws no codes" in refused.output
    assert (result := run_(str(folder))).exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    (table,) = summary["tables"]
    assert [row["name"] for row in table["rows"]] == [
        "no history", "shuffled", "full", "packcache", "window:positions=slots",
    ]  # fmt: skip
    for row in table["rows"]:
        assert 5 < row["nats_scenery"]["mean"] < 12 and row["events"] == row["nats"]["n"] > 0
    assert table["rows"][3]["against_window"]["other"].startswith("window:positions=slots")
    assert "nats a code at gap" in (shown := markdown(summary)) and "protocol L" in shown
    assert "Likelihood and its price" in (out / "report.html").read_text()


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
