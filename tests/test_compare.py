"""A comparison is fair, can be stopped at any time, and never makes a finished cell again."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import longtake
from longtake import FullHistory, LongtakeError, SlidingWindow, policies
from longtake.cli import app
from longtake.compressors import DualBranch, LowResolution
from longtake.evaluate.compare import arms as arm_names
from longtake.evaluate.compare import footage as footage_module
from longtake.evaluate.compare import runner, statistics, summary
from longtake.evaluate.compare.arms import Arm, arms, controls, every
from longtake.evaluate.compare.cells import Cell, Store, fingerprint
from longtake.evaluate.compare.course import comings, course
from longtake.evaluate.compare.footage import Footage, Projector, probes
from longtake.evaluate.compare.markdown import markdown
from longtake.evaluate.compare.matrix import Matrix
from longtake.evaluate.compare.picture import off_actor_ssim, psnr, slopes
from longtake.evaluate.compare.protocols import Setting, fork, held, run
from longtake.evaluate.decay_note import with_decay
from longtake.evaluate.metrics.likeness import ssim_map
from longtake.hosts.base import HostConfig
from longtake.samplers.chunked import NoiseSource
from longtake.zoo import lanes, tiny_vae

from .tiny_checkpoints import write_lanes_model

QUICK = Setting("A", frames=12, gaps=(1, 2), free=6)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FAILING = """
from dataclasses import dataclass
from longtake.policies import SlidingWindow

@dataclass(frozen=True)
class Careless(SlidingWindow):
    def plan(self, table, signals):
        if table.now >= 9:
            raise IndexError("nothing there")
        return super().plan(table, signals)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_lanes_model(tmp_path_factory.mktemp("model") / "random", layers=2)


@pytest.fixture(scope="module")
def host(model):
    return longtake.load(model, device="cpu")


@pytest.fixture(scope="module")
def footage(host) -> Footage:
    return Footage(host, 0, QUICK.length(host), QUICK.gaps)


def take_of(host, policy=None, **options) -> longtake.Session:
    return longtake.Session(
        host, policy or SlidingWindow(9, sink=3), prompt="a ball", decode=False, **options
    )  # fmt: skip


def compare(out: Path, model: Path, *arguments: object):
    line = ["compare", "--out", out, "--model", model, "--frames", 12, "--gap", 1, "--gap", 2, *arguments]
    return [str(word) for word in (*line, "--device", "cpu")]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(word) for word in arguments])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_holm_corrects_as_by_hand():
    # sorted .01 .02 .03 .04 times 4, 3, 2, 1, and never falling
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    corrected = statistics.holm([0.01, float("nan"), 0.02])
    assert corrected[0] == pytest.approx(0.02) and np.isnan(corrected[1]) and corrected[2] == pytest.approx(0.02)


def test_events_of_one_scene_count_as_one_draw():
    rng = np.random.default_rng(0)
    scenes = {seed: float(rng.random() < 0.5) for seed in range(24)}
    alone = statistics.interval({seed: [hit] for seed, hit in scenes.items()})
    repeated = statistics.interval({seed: [hit] * 20 for seed, hit in scenes.items()})
    independent = statistics.interval({k: [hit] for k, hit in enumerate(np.repeat(list(scenes.values()), 20))})
    assert repeated == pytest.approx(alone)
    assert independent[1] - independent[0] < 0.4 * (alone[1] - alone[0])


def test_an_interval_holds_its_mean_and_a_constant_has_none():
    rng = np.random.default_rng(1)
    hits = {seed: (rng.random(int(rng.integers(0, 9))) < 0.3).astype(float).tolist() for seed in range(20)}
    low, high = statistics.interval(hits)
    assert low < statistics.mean(hits) < high
    assert statistics.interval({0: [1.0], 1: [1.0, 1.0]}) == (1.0, 1.0)
    assert np.isnan(statistics.interval({0: [1.0, 0.0], 1: []})[0]), "one scene has no spread"
    assert np.isnan(statistics.mean({})) and np.isnan(statistics.interval({0: []})[0])


def test_a_paired_difference_is_the_same_from_both_sides():
    rng = np.random.default_rng(2)
    first = {seed: (rng.random(5) < 0.6).astype(float).tolist() for seed in range(20)}
    second = {seed: (rng.random(5) < 0.5).astype(float).tolist() for seed in range(20)}
    gap, (low, high), p = statistics.paired(first, second)
    back, (down, up), q = statistics.paired(second, first)
    assert gap == pytest.approx(-back) and (low, high) == pytest.approx((-up, -down)) and p == q
    assert low < gap < high and 0 < p <= 1
    assert statistics.paired(first, first)[0] == 0 and statistics.paired(first, first)[2] == 1


@pytest.mark.parametrize("scenes", [1, 2, 5, 7])
def test_few_scenes_cannot_be_sure(scenes):
    better, worse = ({seed: [hit] * 9 for seed in range(scenes)} for hit in (1.0, 0.0))
    gap, _, p = statistics.paired(better, worse)
    assert gap == 1 and p == pytest.approx(2 / 2**scenes), "all of them agree, and one exchange of all as well"


def test_chance_is_called_sure_no_oftener_than_it_should():
    rng = np.random.default_rng(4)
    draw = lambda: {seed: (rng.random(4) < 0.5).astype(float).tolist() for seed in range(10)}
    found = [statistics.paired(draw(), draw())[2] for _ in range(300)]
    assert np.mean(np.array(found) < 0.05) < 0.09, "about a twentieth of differences that are none"


def test_many_scenes_are_tested_as_the_few_are(monkeypatch):
    rng = np.random.default_rng(5)
    first = {seed: (rng.random(3) < 0.7).astype(float).tolist() for seed in range(12)}
    second = {seed: (rng.random(3) < 0.5).astype(float).tolist() for seed in range(12)}
    exact = statistics.paired(first, second)[2]
    monkeypatch.setattr(statistics, "EXACT", 4)
    assert statistics.paired(first, second)[2] == pytest.approx(exact, abs=0.02) and 0 < exact < 1


def test_pairs_see_what_scenes_have_in_common():
    rng = np.random.default_rng(3)
    ease = {seed: rng.random() for seed in range(40)}
    better = {seed: [min(1.0, x + 0.05)] * 4 for seed, x in ease.items()}
    worse = {seed: [x] * 4 for seed, x in ease.items()}
    gap, (low, _), p = statistics.paired(better, worse)
    assert low > 0 and p < 0.01 and gap == pytest.approx(0.05, abs=0.01)
    assert statistics.interval(better)[0] < statistics.mean(worse), "the intervals alone overlap"


# --- what is compared -------------------------------------------------------------------------------------------------


def test_budgets_are_three_whole_and_different():
    assert runner.default_budgets(HostConfig(training_frames=21)) == (9, 12, 21)
    assert runner.default_budgets(HostConfig(training_frames=63)) == (21, 42, 63)
    for frames in (3, 9, 12, 20):
        budgets = runner.default_budgets(HostConfig(training_frames=frames))
        assert len(set(budgets)) == 3 and all(n % 3 == 0 and n >= 9 for n in budgets)


def test_every_named_policy_has_a_row_at_three_budgets_or_a_note(host):
    notes: list[str] = []
    shape = runner.shape_of(host)
    rows = arms((), runner.default_budgets(host.config), shape, notes)
    for name in set(policies.available()) | {"window:sink=0"}:
        found = [arm for arm in rows if arm.name in (name, f"{name} (not fitted)")]
        told = [note for note in notes if note.startswith(name)]
        assert name == "full" or len(found) + len(told) >= 3, (name, found, told)
        for arm in found:
            if arm.budget is not None:
                capacity = arm.policy.capacity(shape)
                assert capacity * shape.token_bytes <= arm.budget, arm
    assert every().count("window:sink=0") == 1


def test_the_same_policy_stands_once(host):
    notes: list[str] = []
    specs = ["window", "window:sink=0", "window", "window:sink=3", "full", "full"]
    rows = arms(specs, (9, 12, 12), runner.shape_of(host), notes)
    assert [(arm.name, arm.policy) for arm in rows] == [
        ("window", SlidingWindow(9, sink=3)), ("window", SlidingWindow(12, sink=3)),
        ("window:sink=0", SlidingWindow(9, sink=0)), ("window:sink=0", SlidingWindow(12, sink=0)),
        ("full", FullHistory()),
    ]  # fmt: skip
    assert len(notes) == 2 and all("is the same policy as window" in note for note in notes)


def test_a_budget_that_is_too_small_is_told(host):
    notes: list[str] = []
    rows = arms(["window"], (1, 9), runner.shape_of(host), notes)
    assert [arm.policy.frames for arm in rows] == [9]
    assert len(notes) == 1 and notes[0].startswith("window at ")


# --- footage ----------------------------------------------------------------------------------------------------------


def test_options_that_fitting_changes_are_told_and_none_is_changed_without_a_budget(host):
    notes: list[str] = []
    fitted = arms(["packforcing:sink=9,recent=1", "window:sink=3"], (9,), runner.shape_of(host), notes)
    assert fitted[0].policy.sink < 9
    assert notes == [
        f"packforcing:sink=9,recent=1 at {fitted[0].budget // 1024} KiB is fitted with sink={fitted[0].policy.sink}"
    ]
    given = arms(["packcache:max_frames=4", "window:frames=9"], (), runner.shape_of(host), notes[:0])
    assert [arm.name for arm in given] == ["packcache:max_frames=4", "window:frames=9"]
    assert [arm.budget for arm in given] == [None, None] and given[0].policy.max_frames == 4


def test_probes_begin_with_a_return_and_long_gaps_are_not_lost():
    scene = lanes.scene(3, 200, gaps=(1, 1, 1, 1, 64))
    found = probes(scene, 120, 3)
    assert [probe.frame for probe in found] == sorted({probe.frame for probe in found}) and len(found) == 8
    for probe in found:
        assert probe.frame % 3 == 0
        for event in probe.events:
            lane, visit = event.of(scene)
            assert probe.frame <= visit.start < probe.frame + 3
            assert event.gap == visit.start - lane.visits[event.visit - 1].end
    everything = [
        e for frame in range(6, 121, 3) for p in probes(scene, frame, 3) if p.frame == frame for e in p.events
    ]
    assert sum(e.gap == 64 for p in found for e in p.events) == sum(e.gap == 64 for e in everything) > 0


def test_latents_are_encoded_once_and_kept(host, tmp_path):
    first = Footage(host, 1, 6, (1,), tmp_path).latents(6)
    assert first.shape == (1, tiny_vae.Z_DIM, 6, 16, 16)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    assert torch.equal(Footage(host, 1, 6, (1,), tmp_path).latents(6), first)
    assert files[0].stat().st_mtime_ns == stamp
    assert not torch.equal(Footage(host, 1, 6, (1,), tmp_path).latents(6, disguised=True), first)


@torch.no_grad()
def test_true_frames_are_decoded_for_all_takes_at_once_as_each_would_by_itself(host):
    footage = Footage(host, 0, 9, (1,))
    true = footage.latents(9)
    chunks = [*true[:, :, :6].split(3, 2), -true[:, :, :3], true[:, :, 6:]]  # the third is not what follows
    decoder = host.decoder()
    with footage_module.half_on_cpu(host.device):
        alone = [decoder.push(chunk) for chunk in chunks]
    for _ in range(2):
        projector = Projector(footage)
        frames = [projector.push(chunk) for chunk in chunks[:2]]
        twin = copy.deepcopy(projector)  # a take forks where generation starts
        frames += [twin.push(chunk) for chunk in chunks[2:]]
        assert all(map(torch.equal, frames, alone))
        assert twin.nbytes == decoder.nbytes
        assert sorted(footage.film) == [(0, 3), (3, 6)]
    assert torch.equal(projector.push(chunks[2]), frames[2])  # the twin's pushes left the first alone


def test_a_warm_decoder_shows_the_same_frames_the_second_time(footage):
    truth = footage.latents(QUICK.length(footage.host))
    first, second = (footage.pixels(6, truth[:, :, 6:9]) for _ in range(2))
    assert first.shape == (12, 128, 128, 3) and np.array_equal(first, second)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_likeness_is_whole_for_the_same_picture_only():
    scene = lanes.scene(4)
    video = scene.render(17, 40)
    assert ssim_map(video[:2], video[:2]).min() > 0.999
    assert off_actor_ssim(video, scene, 40) > 0.999
    assert off_actor_ssim(255 - video, scene, 40) < 0.5
    assert psnr(video, video) > 100 and psnr(video, 255 - video) < 10


def test_fading_is_a_slope_of_light():
    video = np.full((101, 4, 4, 3), 100, np.uint8) - np.arange(101, dtype=np.uint8)[:, None, None, None] // 2
    assert slopes(video)["luma_slope"] == pytest.approx(-2000, rel=0.02)  # half a level a frame, 4,000 frames
    assert slopes(video)["contrast_slope"] == 0


def test_comings_are_those_who_were_hidden():
    seen = np.array([1] * 3 + [0] * 4 + [1] * 5 + [0] * 2 + [1] * 2 + [0] * 6 + [1] * 4, bool)
    assert list(comings(seen)) == [(3, [7, 8, 9, 10, 11, 14, 15]), (16, [22, 23, 24, 25])]
    assert list(comings(np.zeros(9, bool))) == [] and list(comings(np.ones(9, bool))) == []


def test_the_truth_is_recalled_and_a_loop_and_a_frozen_picture_are_not():
    truth, loop, frozen = [], [], []
    for seed in range(2):
        scene = lanes.scene(seed, 110, gaps=(1, 2, 4, 8))
        start, count = 4 * 20 + 1, 24 * 12
        true = course(scene.render(count, start), scene, start, 3)
        truth += true["returns"]
        assert true["clock_lawful"] == 1 and true["background_ssim"] > 0.999 and true["first_error"] is None
        past = scene.render(24, start - 24)
        loop += course(np.concatenate([past] * 12), scene, start, 3)["returns"]
        still = course(past[-1:].repeat(count, 0), scene, start, 3)
        frozen += still["returns"]
        assert still["clock_lawful"] < 0.01
    assert len(truth) > 15 and all(event["colour"] and event["texture"] for event in truth)
    assert len(loop) > 15 and np.mean([event["colour"] for event in loop]) <= 1 / 8
    assert frozen == []


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SlidingWindow(9, sink=3), FullHistory()], ids=["window", "full"])
def test_a_fork_goes_on_like_its_take_and_leaves_it_as_it_was(host, policy):
    take, twin = (take_of(host, policy, seed=3, chunks=8) for _ in range(2))
    for _ in range(3):
        assert torch.equal(next(take).latents, next(twin).latents)
    state = take.noise.state()[0]
    aside = list(fork(take, 5, 2))
    again = list(fork(take, 5, 2))
    other = list(fork(take, 6, 2))
    assert len(aside) == 2 and all(torch.equal(a.latents, b.latents) for a, b in zip(aside, again, strict=True))
    assert not torch.equal(aside[0].latents, other[0].latents)
    assert torch.equal(take.noise.state()[0], state) and take.index == 3
    assert torch.equal(next(take).latents, next(twin).latents), "the fork changed its take"
    twin.noise = NoiseSource([torch.Generator().manual_seed(5)])
    copied = fork(take, 5, 1)
    assert torch.equal(next(copied).latents, next(twin).latents), "the fork is another take"


@pytest.mark.parametrize("arm", controls(longtake.HistoryShape(4, 4, 32, 4, 64, 3), 21), ids=lambda arm: arm.name)
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_every_control_gives_a_cell_that_is_json(host, footage, arm, protocol):
    setting = replace(QUICK, protocol=protocol)
    source = footage if protocol == "A" else Footage(host, 0, setting.length(host), setting.gaps)
    cell = json.loads(json.dumps(run(arm, source, setting)))
    if protocol == "A":
        assert cell["events"] and all(event["gap"] in (1, 2) for event in cell["events"])
        assert len(cell["psnr"]) == len(probes(source.scene, 12, 3))
    else:
        assert cell["chunks"] == 2 and 0 <= cell["clock_lawful"] <= 1
    assert (cell["attended_tokens"] > 0) == (arm.policy is not None)


def test_no_history_sees_itself_alone_and_full_history_everything(host, footage):
    alone = run(controls(runner.shape_of(host), 21)[3], footage, QUICK)
    full = run(Arm("full", FullHistory()), footage, QUICK)
    per_chunk = 3 * 64
    last = probes(footage.scene, 12, 3)[-1].frame
    assert alone["attended_tokens"] == per_chunk
    assert full["attended_tokens"] == (last + 6) * 64
    assert alone["bytes"]["total"] < full["bytes"]["total"]


def test_arms_see_the_same_noise_and_the_same_places(host, footage):
    first, second = (run(Arm("a", policy), footage, QUICK) for policy in (FullHistory(), SlidingWindow(63, sink=3)))
    assert first["events"] == second["events"] and first["psnr"] == second["psnr"], "a window that covers all is full"


def test_bytes_count_what_the_device_and_the_host_hold(host):
    whole = take_of(host, longtake.PackForcing(sink=1, recent=1, top_k=2, archive=4, layers="shared"))
    away = take_of(host, longtake.PackForcing(sink=1, recent=1, top_k=2, archive=4, layers="shared", offload=True))
    for take in (whole, away):
        for _ in range(5):
            next(take)
    here, there = held(whole), held(away)
    assert "archive" not in here and here["device"] == here["total"] == whole.memory()["total"]
    assert there["total"] - there["device"] == away.memory()["archive"] > 0
    parts = {key: size for key, size in there.items() if key not in ("device", "total")}
    assert sum(parts.values()) == there["total"]


def test_weights_of_a_trained_compressor_count(host):
    compressor = DualBranch.sized(tiny_vae.Z_DIM, 128)
    take = take_of(host, longtake.PackForcing(sink=1, recent=1, top_k=2, archive=4), compressor=compressor)
    next(take)
    weights = sum(p.nbytes for p in compressor.parameters())
    assert weights > 0 and held(take)["total"] == take.memory()["total"] + weights == held(take)["device"]


def test_policies_that_compress_stand_once_under_each_compressor(model, monkeypatch):
    plan = runner.Plan(
        (str(model),), ("packforcing", "window"), (21,), 1, (QUICK,), "cpu", compressors=("own", "low-resolution")
    )
    rows = [cell for cell in runner.cells(plan, []) if not cell.arm.control]
    assert [cell.arm.name for cell in rows] == ["packforcing", "packforcing (low-resolution)", "window"]
    assert rows[0].arm.policy == rows[1].arm.policy and len({cell.key for cell in rows}) == 3
    assert rows[0].arm.made_by() is None and isinstance(rows[1].arm.made_by(), LowResolution)
    with pytest.raises(LongtakeError, match="no policy here compresses"):
        runner.cells(replace(plan, policies=("window",)), [])
    with pytest.raises(LongtakeError, match="no compressor 'tall'"):
        runner.cells(replace(plan, compressors=("tall",)), [])


def test_a_model_with_several_chunks_in_flight_is_refused_with_what_to_do_instead():
    assert "tiny-skyreels" not in runner.default_models() and "tiny-wan" in runner.default_models()
    with pytest.raises(LongtakeError, match=r"several chunks in flight.*bench flowcache"):
        runner.cells(runner.Plan(("tiny-skyreels",), ("window",), (21,), 1, (QUICK,), "cpu"), [])


def test_a_models_compressor_counts_for_those_who_compress_only(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    plain = fingerprint(copy)
    assert fingerprint(copy, compressor=False) == plain
    DualBranch.sized(tiny_vae.Z_DIM, 128).save_pretrained(copy / "compressor")
    assert fingerprint(copy) != plain == fingerprint(copy, compressor=False)
    cells = runner.cells(runner.Plan((str(copy),), ("packforcing", "window"), (21,), 1, (QUICK,), "cpu"), [])
    assert {cell.arm.name: cell.weights == plain for cell in cells if not cell.arm.control} == {
        "packforcing": False, "window": True,
    }  # fmt: skip


def test_a_cell_is_known_by_all_that_decides_it_and_by_nothing_else(model):
    cell = Cell("here", "w", "float32", Arm("window", SlidingWindow(9)), 0, QUICK)
    assert cell.key == replace(cell, model="there").key == replace(cell, arm=Arm("w", SlidingWindow(9))).key
    others = [
        replace(cell, weights="v"), replace(cell, dtype="bfloat16"), replace(cell, seed=1),
        replace(cell, arm=Arm("window", SlidingWindow(12))), replace(cell, setting=replace(QUICK, frames=15)),
        replace(cell, arm=Arm("window", SlidingWindow(9), arm_names.SHUFFLED)),
    ]  # fmt: skip
    assert len({cell.key, *(other.key for other in others)}) == 7
    before = fingerprint(model)
    (model / "training.json").write_text("{}\n")
    assert fingerprint(model) == before


def test_another_measured_decay_makes_another_cell_and_only_of_those_who_go_by_it(model, tmp_path):
    def keys(note: float | None, free: bool = False) -> dict[str, str]:
        copy = tmp_path / str(note)
        if not copy.exists():
            shutil.copytree(model, copy)
            if note is not None:
                text = (copy / "longtake.json").read_text()
                (copy / "longtake.json").write_text(with_decay(text, note))
        specs = ("packcache:rho=auto", "packcache", "window")
        takes = Matrix(prompts=("a ball",), policies=specs, chunks=(2,), seeds=(0,)) if free else None
        plan = runner.Plan((str(copy),), () if free else specs, (9,), 1, (QUICK,), "cpu", takes=takes)
        return {cell.arm.name: cell.key for cell in runner.cells(plan, []) if not cell.arm.control}

    for free in (False, True):
        slow, slower, without = keys(0.8, free), keys(0.9, free), keys(None, free)
        assert slow["packcache:rho=auto"] != slower["packcache:rho=auto"]
        assert {**slow, "packcache:rho=auto": ""} == {**slower, "packcache:rho=auto": ""}
        assert "packcache:rho=auto" not in without and without["packcache"] == slow["packcache"]


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_compares_and_says_so_in_one_page(model, tmp_path):
    policy = tmp_path / "mine.py"
    policy.write_text(FAILING)
    out = tmp_path / "out"
    line = compare(
        out, model, "--policy", "window", "--policy", "window:sink=0", "--policy", "full", "--policy",
        f"{policy}:Careless", "--budget", 9, "--seeds", 2, "--protocol", "A", "--protocol", "B",
        "--free", 6, "--workers", 2, "--json",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "longtake", *line], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == json.loads((out / "summary.json").read_text())
    assert answer["cells"] == 2 * 2 * (5 + 3 + 1)
    assert "IndexError: nothing there" in done.stderr, "whoever looks at the terminal alone is told too"
    failed = [note for note in answer["notes"] if "IndexError: nothing there" in note]
    assert len(failed) == 1 and "(4 cells, seed 0 first)" in failed[0], answer["notes"]
    assert answer["finished"] == answer["cells"] - 2 * 2
    assert [table["protocol"] for table in answer["tables"]] == ["A", "B"]
    for table in answer["tables"]:
        labels = [row["arm"] for row in table["rows"]]
        assert labels[:5] == list(arm_names.CONTROLS) and "full" in labels and len(labels) == len(set(labels)) == 8
        assert table["admitted"] == {"recall_colour": False, "recall_texture": False}, "a random model shows nothing"
    tested = [row for row in answer["tables"][0]["rows"] if row["name"].startswith("window")]
    assert len(tested) == 2 and all(0 <= row["against_full"]["p_holm"] <= 1 for row in tested)
    html = (out / "report.html").read_text()
    assert "default-src 'none'" in html and html.count("data-view=tradeoff") == 2 and "nothing there" in html
    assert sum(one["cells"] for one in answer["made_by"]) == answer["finished"]
    for cell in (out / "cells").glob("*.json"):
        files = json.loads(cell.read_text())["outcome"]["files"]
        assert (
            {"take.mp4", "chunks.json"} <= set(files) == {path.name for path in (out / "cells" / cell.stem).iterdir()}
        )
    made = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    again = subprocess.run(
        [sys.executable, "-m", "longtake", *line[:-3], *line[-2:]], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert again.returncode == 0 and {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == made


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_loses_at_most_the_cells_in_flight(model, tmp_path, workers):
    out = tmp_path / "out"
    line = compare(out, model, "--policy", "full", "--seeds", 2, "--workers", workers)
    process = subprocess.Popen(
        [sys.executable, "-m", "longtake", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    finished = lambda: {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    wait(lambda: len(finished()) >= 3 or process.poll() is not None, 300)
    assert process.poll() is None, "it was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: not alive(process.pid), 60)  # the workers notice
    before = finished()
    assert 3 <= len(before) < 12
    for path in before:
        assert json.loads(path.read_text())["outcome"], "a cell is whole or not there"
    assert invoke(*line).exit_code == 0
    after = finished()
    assert len(after) == 12 and {path: after[path] for path in before} == before


def alive(group: int) -> bool:
    """Whether a process of the group is left that is no zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(of) == group and state != "Z":
            return True
    return False


def wait(done, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_every_policy_runs_at_every_budget(model, tmp_path, monkeypatch):
    monkeypatch.setattr(footage_module, "PROBES", 1)
    notes: list[str] = []
    plan = runner.Plan((str(model),), budgets=(9, 12, 21), seeds=1, settings=(QUICK,), device="cpu")
    todo, store = runner.cells(plan, notes), Store(tmp_path)
    assert len({cell.arm.name for cell in todo}) > len(policies.available())
    failed = runner.execute(plan, todo, store, tmp_path)
    absent = [cell for cell in todo if cell not in store]
    assert len(failed) == len(absent), failed
    made = summary.summarise(todo, store.finished(todo), runner.training_frames(plan))
    assert len(made["tables"][0]["rows"]) == len(todo) - len(absent)
    text = markdown({"tables": made["tables"], "command": "longtake compare", "origin": {}})
    _, table, *_ = text.split("\n\n")  # its title stands before it; recall by gap after it, if noise recalls something
    assert len(table.splitlines()) == 2 + len(todo) - len(absent)
    assert not absent, failed


def test_policies_are_tested_against_the_window_of_their_own_budget():
    made = {"full": (1, 1), "mine @ 9": (1, 1), "window @ 9": (0, 0), "mine @ 21": (0, 1), "window @ 21": (1, 1)}
    rows = [
        {"arm": label, "name": label.partition(" ")[0], "budget": int(label.partition("@ ")[2] or 0) or None}
        for label in made
    ]
    cells = {
        label: [{"seed": seed, "outcome": {"events": [{"colour": hit}] * 3}} for seed, hit in enumerate(hits)]
        for label, hits in made.items()
    }
    summary._differences(rows, cells, "A")
    found = {row["arm"]: row.get("against_window") for row in rows}
    assert found["full"] is found["window @ 9"] is found["window @ 21"] is None
    assert found["mine @ 9"]["other"] == "window @ 9" and found["mine @ 9"]["difference"] == 1
    assert found["mine @ 21"]["other"] == "window @ 21" and found["mine @ 21"]["difference"] == -0.5
    assert found["mine @ 21"]["p_holm"] > 0.05, "one scene of two says nothing"
    assert rows[2]["against_full"]["difference"] == -1


# --- admission --------------------------------------------------------------------------------------------------------


def rows_of(truth: float, frozen: float, loop: float | None) -> list[dict]:
    found = {"truth": truth, "frozen": frozen, "loop": loop}
    return [
        {"control": name, "recall_colour": {"n": 9, "mean": value} if value is not None else {"n": 0}}
        for name, value in found.items()
    ]


@pytest.mark.parametrize(
    ("truth", "frozen", "loop", "admitted"),
    [
        (0.96, 0.0, 0.1, True),
        (0.94, 0.0, 0.1, False),
        (0.96, 0.2, 0.0, False),
        (0.96, 0.0, 0.2, False),
        (1, 0, None, True),
    ],
)
def test_a_measure_is_admitted_if_truth_is_high_and_idle_pictures_are_low(truth, frozen, loop, admitted):
    assert summary._admitted(rows_of(truth, frozen, loop))["recall_colour"] is admitted


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames", 500], "--frames 500: give 12 to 400"),
        (["--protocol", "C"], "--protocol C: give A, B or L"),
        (["--workers", 0], "--workers 0: give at least 1"),
        (["--seeds", 0], "--seeds 0: give at least 1"),
        (["--gap", 0], "--gap 0: give at least 1"),
        (["--free", 3], "--free 3: give at least 6"),
        (["--free", 9], "--free 9 is for protocol B"),
        (["--as-given", "--budget", 9], "--as-given beside --budget"),
        (["--against", "full", "--policy", "window"], "--against full: none of the policies compared"),
        (["--policy", "nobody"], "no policy 'nobody'"),
        (["--model", "tiny-shapes"], "tiny-shapes was not trained on the procedural world"),
    ],
)
def test_mistakes_are_told_in_one_line(model, tmp_path, arguments, words):
    result = invoke("compare", "--out", tmp_path, "--model", model, "--device", "cpu", *arguments)
    assert result.exit_code == 2 and words in result.stderr and not (tmp_path / "cells").exists()


def test_without_a_model_of_the_world_it_says_how_to_make_one(monkeypatch):
    monkeypatch.setattr(runner, "embedded", dict)
    with pytest.raises(LongtakeError, match="longtake train tiny-wan"):
        runner.default_models()
