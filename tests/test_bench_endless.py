"""`longtake bench endless`: what is lawful, flat and level is told from what is not, and the answer is complete."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from longtake import LongtakeError
from longtake.cli import app
from longtake.evaluate import bench_suite
from longtake.evaluate.bench_endless import _targets, run
from longtake.evaluate.endless_report import EndlessReport, Light, Mark
from longtake.evaluate.lawful_motion import Motion, clock_turns, of_lanes, of_steps, passages, speed
from longtake.evaluate.metrics.light import brightness
from longtake.evaluate.metrics.trend import Trend, line
from longtake.zoo import lanes, world

from .tiny_checkpoints import write_lanes_model

pytestmark = pytest.mark.usefixtures("idle")

WINDOW, PACKED = "window:frames=6,sink=2", "packforcing:sink=1,recent=1,top_k=1,archive=1"
SCENE = lanes.scene(3, 60, gaps=(1, 2))


@pytest.fixture(scope="module")
def lawful() -> np.ndarray:
    """Fifty latent frames of a true scene, from latent frame 1 on."""
    return SCENE.render(200, 1)


# --- the world of lanes -----------------------------------------------------------------------------------------------


def test_a_true_scene_is_lawful_in_every_passage_and_every_turn(lawful):
    found = of_lanes(lawful, SCENE)
    assert found.seen >= 5 and found.lawful == found.seen
    assert found.clock_steps == found.clock_turns == 1.0 and found.moves


def test_a_frozen_a_hurried_and_a_scrambled_scene_are_not(lawful):
    frozen = np.repeat(lawful[:1], 200, 0)
    hurried = np.repeat(lawful.reshape(-1, 4, *lawful.shape[1:])[::2, 0], 4, 0)
    scrambled = lawful[np.random.default_rng(0).permutation(200)]
    for video in (frozen, hurried, scrambled):
        found = of_lanes(video, SCENE)
        assert found.lawful == found.clock_turns == 0 and not found.moves


def test_an_actor_who_vanishes_half_way_has_made_no_passage(lawful):
    number, lane = next((i, lane) for i, lane in enumerate(SCENE.lanes) if lane)
    before = passages(lawful, SCENE, number)
    x = lane.at(np.arange(1, 201))[0]
    strip = lawful[:, number * lanes.LANE : (number + 1) * lanes.LANE]
    empty = strip[np.flatnonzero(np.isnan(x))[0]]
    video = lawful.copy()
    for visit in lane.visits:
        gone = slice(max(0, 4 * (visit.start + visit.frames // 2) - 4), max(0, 4 * visit.end - 4))
        video[gone, number * lanes.LANE : (number + 1) * lanes.LANE] = empty
    after = passages(video, SCENE, number)
    assert all(before) and len(before) >= 2
    assert len(after) >= 2 and not any(after)


def test_a_clock_that_trembles_in_place_makes_no_turn():
    trembling = 0.5 + 0.002 * np.random.default_rng(0).standard_normal(200)
    assert clock_turns(trembling) == 0 and clock_turns(np.arange(200) / lanes.TURN % 1) == 1
    assert clock_turns(np.zeros(10)) is None, "too short for a turn"


# --- no world ---------------------------------------------------------------------------------------------------------


def shapes(motion: str, frames: int = 160) -> np.ndarray:
    actor = world.Actor("ball", "red", 9.0, (1.0, 0.7), (20.0, 0.5), 28.0, 30.0)
    return world.Scene("dark", motion, (actor,)).render(frames)


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_a_bouncing_shape_keeps_its_speed_and_the_first_of_two_is_followed(motion):
    video = shapes(motion)
    begun = speed(video[:84], 4)
    assert begun == pytest.approx(4.0, rel=0.1)
    found = of_steps(video, 4, begun)
    assert found.seen == 39 and found.lawful > 0.8 * found.seen and found.moves


def test_a_shape_that_stands_creeps_or_is_gone_does_not_move_by_its_law():
    video = shapes("moving")
    begun = speed(video[:84], 4)
    still, creeping = np.repeat(video[:1], 80, 0), np.repeat(video[:20], 4, 0)
    for piece in (still, creeping, np.zeros_like(video)):
        assert not of_steps(piece, 4, begun).moves
    assert speed(still, 4) is None and not of_steps(video, 4, None).moves


# --- light ------------------------------------------------------------------------------------------------------------


def test_a_drift_is_found_within_its_interval_and_a_level_video_has_none():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 5, (2000, 1, 1, 1))
    level = np.broadcast_to(100 + noise, (2000, 4, 4, 3)).astype(np.uint8)
    drifting = (level + np.arange(2000)[:, None, None, None] // 100).astype(np.uint8)  # 20 levels in 500 latent frames
    found = [line(brightness(video), 80, 4000) for video in (level, drifting)]
    assert found[0].low <= 0 <= found[0].high and abs(found[0].slope) < 1
    assert found[1].slope == pytest.approx(40, abs=1) and found[1].high - found[1].low < 4


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of the world of lanes with random weights, chunks of two latent frames and clips of four."""
    folder = write_lanes_model(tmp_path_factory.mktemp("model") / "random", layers=1)
    return changed(folder, training_frames=4, chunk_frames=2, timesteps=[1000])


@pytest.fixture(scope="module")
def worldless(model, tmp_path_factory) -> Path:
    """The same as a model of nothing that is known."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("worldless") / "random")
    return changed(folder, world="", height=32, width=32)


def changed(folder: Path, **settings) -> Path:
    path = folder / "longtake.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.fixture(scope="module")
def report(model, idle) -> EndlessReport:
    return run("micro", model=str(model), policies=(WINDOW, PACKED), latent_frames=17, device="cpu", command="longtake")


def test_every_policy_has_a_take_of_whole_chunks_with_all_that_is_promised(report):
    assert [take.policy for take in report.takes] == [WINDOW, PACKED] and len(report.truths) == 1
    for take in report.takes:
        assert take.latent_frames == report.shape["latent_frames"] == 18 and len(take.chunk_ms) == 9
        assert take.settled is not None and len(take.early_ms) == len(take.late_ms) == 2
        assert take.marks[-1].chunk == 9 and len(take.full_marks) >= 3
        assert len({mark.tensors for mark in take.full_marks}) == 1, "live tensors do not grow"
        assert take.session_bytes["total"] > 0 and take.light["contrast"].trend is not None
        assert take.first.what == take.last.what == "passages" and take.last.clock_steps is not None
    assert report.takes[0].marks[-1].history != report.takes[1].marks[-1].history
    names = [figure.name for figure in report.figures]
    assert f"late / early, {WINDOW}" in names and f"slope of contrast, {PACKED}" in names
    assert len(report.targets) == 2 * 5
    assert all(target.met is None and "not the 2,000" in target.note for target in report.targets)


def test_the_true_scene_stands_beside_the_takes(report):
    (truth,) = report.truths
    assert truth.motion.what == "passages" and truth.light["mean luma"].trend is not None
    assert report.markdown().count("| the true scene | 0 |") == 1


def test_a_report_is_read_back_as_it_was_and_fills_its_block(report, tmp_path):
    report.write(tmp_path, "endless-cpu")
    assert (tmp_path / "endless-cpu.png").read_bytes().startswith(b"\x89PNG")
    again = bench_suite.read(tmp_path / "endless-cpu.json")
    # a file has fewer digits than the run had, and is what tables are made from
    assert isinstance(again, EndlessReport) and again.as_dict() == report.as_dict()
    block = "<!-- bench:endless -->\n<!-- /bench:endless -->"
    assert again.markdown() in bench_suite.fill(block, tmp_path) and "late / early" in again.text()
    assert "late / early" in report.text() and "per 1,000 latent frames" in report.text()


def judged(report: EndlessReport, **found) -> list[bool | None]:
    """The window's targets as if its take had been as long as is promised: flat, as fast, luma, contrast, motion."""
    level = {name: Light([100.0], Trend(0.2, -0.3, 0.7, 100.0)) for name in ("mean luma", "contrast")}
    told = {"latent_frames": 2001, "light": level, "last": Motion("passages", 1, 9, 0.5, 0.0)} | found
    figures = [replace(f, ci95=(0.98, 1.2)) if f.name.startswith("late /") else f for f in report.figures]
    others = {"before": 0.0, "during": 0.0}
    whole = replace(report, takes=[replace(report.takes[0], **told)], figures=figures, others_busy=others)
    return [target.met for target in _targets(whole, WINDOW)]


def test_what_is_missed_is_said_to_be_missed(report):
    assert judged(report) == [True] * 5
    grown = [Mark(n, 1000 + n, 10, None) for n in range(5, 10)]
    assert judged(report, marks=grown)[0] is False
    assert judged(report, full=9)[0] is None, "a bounded history that the take was too short for"
    assert judged(report, full=9, bounded=False)[0] is False
    steep = {name: Light([1.0], Trend(-1.2, -2.0, -0.4, 1.0)) for name in ("mean luma", "contrast")}
    assert judged(report, light=steep)[2:4] == [False, False]
    assert judged(report, last=Motion("passages", 0, 9, 0.5, 0.4))[4] is False
    assert judged(report, last=Motion("passages", 0, 9, 0.5, 0.6))[4] is True, "the clock is an object too"


def test_a_model_without_a_world_begins_with_its_own_prompt_and_the_command_answers(worldless, tmp_path):
    options = ["--shape", "micro", "--model", str(worldless), "--latent-frames", "18", "-p", WINDOW]
    answer = CliRunner().invoke(
        app, ["bench", "endless", *options, "--json", "--out", str(tmp_path), "--device", "cpu"]
    )
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    (take,) = found["takes"]
    assert take["first"]["what"] == take["last"]["what"] == "steps" and take["last"]["seen"] == 7
    assert not found["truths"] and (tmp_path / "endless-random-cpu.json").is_file()


def test_bad_input_is_one_line_that_says_what_to_do(worldless, tmp_path):
    for options, words in (
        (["--seeds", "0"], "at least 1 seed"),
        (["--pairs", "1"], "2 pairs"),
        (["--latent-frames", "9"], "give 16 or more"),
        (["--shape", "endless"], "use one of long, micro"),
        (["-p", "windo"], "windo"),
        (["--model", "tiny-nothing"], "no model 'tiny-nothing'"),
    ):
        command = ["bench", "endless", "--model", str(worldless), *options, "--out", str(tmp_path)]
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code == 2 and words in answer.output, answer.output
        assert "Traceback" not in answer.output
    with pytest.raises(LongtakeError, match="at least one"):
        run("micro", model=str(worldless), policies=())
