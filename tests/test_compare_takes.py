"""Free takes keep everything that was made and measured of them, and survive whatever happens to their folder."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import longtake
from longtake import LongtakeError, SlidingWindow
from longtake.cli import app
from longtake.cluster.comparing import OnRay
from longtake.evaluate.compare import adapters, against, runner
from longtake.evaluate.compare.arms import Arm, take_arms
from longtake.evaluate.compare.cells import Store
from longtake.evaluate.compare.executor import Job
from longtake.evaluate.compare.matrix import Matrix, read_matrix
from longtake.evaluate.compare.take_tables import take_tables
from longtake.evaluate.compare.takes import replayed
from longtake.evaluate.metrics.likeness import psnr_frames
from longtake.history.sight import Sight
from longtake.named import spec
from longtake.reuse import registry as reuses
from longtake.video import read_video

from .tiny_checkpoints import write_lanes_model

POLICIES = ("window:frames=9,sink=3", "packforcing:sink=1,recent=1,top_k=1,archive=4")
REUSE = "flowcache:threshold=1000,warmup=0,last=none"
FILES = {"take.mp4", "latents.safetensors", "chunks.json", "sight.json", "frames.json"}
PROMPT = "a ball / and a square"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_lanes_model(tmp_path_factory.mktemp("model") / "random", layers=1)


@pytest.fixture(scope="module")
def host(model):
    return longtake.load(model, device="cpu")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A finished comparison: plan, cells, store, notes, folder."""
    out = tmp_path_factory.mktemp("takes")
    matrix = Matrix(
        policies=POLICIES, reuse=("none", REUSE), prompts=(PROMPT, "a ball"), seeds=(3,), chunks=(5,),
        height=32, width=32,
    )  # fmt: skip
    plan = runner.Plan((str(model),), settings=(), device="cpu", takes=matrix)
    notes: list[str] = []
    todo, store = runner.cells(plan, notes), Store(out)
    notes += runner.execute(plan, todo, store, out)
    return plan, todo, store, notes, out


def line(out: Path, model: Path, *arguments: object) -> list[str]:
    words = ["compare", "-o", out, "--model", model, "--device", "cpu", "--prompt", PROMPT, "--chunks", 2]
    return [str(word) for word in (*words, "--size", "32x32", *arguments)]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(word) for word in arguments])


def read(path: Path):
    return json.loads(path.read_text())


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


# --- what a take keeps ------------------------------------------------------------------------------------------------


def test_a_take_keeps_its_video_latents_costs_decisions_sight_and_origin(run, host):
    _, todo, store, notes, _ = run
    assert notes == [] and len(todo) == 8 and all(cell in store for cell in todo)
    cell = next(cell for cell in todo if cell.arm.reuse is not None and cell.arm.name == POLICIES[1])
    content, folder = store.get(cell), store.files(cell)
    outcome = content["outcome"]
    assert set(outcome["files"]) == FILES and {path.name for path in folder.iterdir()} >= FILES
    take = longtake.Session(
        host, cell.arm.policy, reuse=cell.arm.reuse, prompt=cell.setting.prompt, seed=cell.seed, height=32, width=32,
        chunks=5,
    )  # fmt: skip
    made = list(take)
    latents = load_file(folder / "latents.safetensors")["latents"]
    assert torch.equal(latents.transpose(0, 1), torch.cat([chunk.latents for chunk in made], 1))
    frames = np.concatenate([chunk.frames.numpy() for chunk in made])
    assert np.array_equal(np.concatenate(list(replayed(host, folder))), frames), "its frames can be had again, exactly"
    video = read_video(folder / "take.mp4")
    assert video.shape == frames.shape and abs(video.mean((1, 2)) - frames.mean((1, 2))).max() < 16
    chunks = read(folder / "chunks.json")
    assert [c["attended_tokens"] for c in chunks] == [chunk.stats.attended_tokens for chunk in made]
    assert [[d["reused"] for d in c["decisions"]] for c in chunks] == [
        [d.reused for d in chunk.stats.decisions] for chunk in made
    ]
    assert outcome["reused"] == sum(chunk.stats.reused for chunk in made) > 0 < outcome["skipped_flops"]
    assert outcome["frames"] == len(frames) == len(read(folder / "frames.json")["per_frame"]["brightness"])
    assert outcome["bytes"]["total"] >= max(take.memory()["total"], 1)
    origin = content["origin"]
    assert origin["config"] == content["key"] == cell.key and origin["versions"]["torch"] == torch.__version__
    assert {"machine", "git", "date", "seconds"} <= set(origin)


def test_what_was_seen_adds_up_to_what_was_attended(run):
    _, todo, store, _, _ = run
    some_hidden = False
    for cell in todo[:4]:
        folder = store.files(cell)
        for chunk, row in zip(read(folder / "chunks.json"), read(folder / "sight.json")["chunks"], strict=True):
            seen = [(block, one) for block in row["blocks"] for one in block["seen"]]
            shown = sum(one["tokens"] * one["share"] for _, one in seen)
            assert shown + row["tokens"] == chunk["attended_tokens"] and row["frame"] == chunk["frame"] == row["at"]
            assert all(one["tokens"] <= block["held"][one["form"]] for block, one in seen)
            assert [one["at"] for _, one in seen] == sorted(one["at"] for _, one in seen)
            assert all(one["at"] + block["span"] <= row["at"] for block, one in seen), "the past lies before"
            some_hidden |= any(not block["seen"] for block in row["blocks"])
    assert some_hidden, "an archive holds more than is shown"


def test_moved_blocks_are_told_where_they_stood(host):
    policy = longtake.PackForcing(sink=1, recent=1, top_k=1)
    take = longtake.Session(host, policy, prompt="a ball", chunks=6, decode=False, height=32, width=32)
    sight = Sight(take.history)
    for _ in take:
        pass
    past = sight.past()
    assert [each.block.frame for each in past] == [0, 3, 6, 9, 12]
    sink, *middle, recent = past
    (at,) = [seen.at for each in middle for seen in each.seen]
    assert (at, sink.seen[0].at, recent.seen[0].at) == (9, 6, 12), "packed against the newest chunk"
    assert sum(bool(each.seen) for each in middle) == 1 == sum(s.share for each in middle for s in each.seen)


def test_takes_with_reuse_are_measured_against_the_same_take_without(run, host):
    _, todo, store, _, _ = run
    for cell in todo:
        reference, found = against.reference_of(cell), against.likeness(store, cell)
        assert (reference is None) == (found is None) == (cell.arm.reuse is None)
    cell = next(cell for cell in todo if cell.arm.reuse is not None)
    reference = against.reference_of(cell)
    assert (reference.seed, reference.setting, reference.arm.policy) == (cell.seed, cell.setting, cell.arm.policy)
    ours, theirs = (np.concatenate(list(replayed(host, store.files(one)))) for one in (cell, reference))
    found = against.likeness(store, cell)
    assert found["psnr_per_frame"] == pytest.approx(psnr_frames(ours, theirs), abs=1e-4)
    assert 0 < found["psnr"] < 100 and found["ssim"] < 1, "it saves something"


def test_reuse_that_reuses_nothing_equals_its_reference(model, tmp_path):
    matrix = Matrix(reuse=("none", "teacache:0"), prompts=("a ball",), chunks=(2,), height=32, width=32)
    plan = runner.Plan((str(model),), settings=(), device="cpu", takes=matrix)
    todo, store = runner.cells(plan, []), Store(tmp_path)
    assert runner.execute(plan, todo, store, tmp_path) == []
    assert against.likeness(store, todo[1])["psnr"] == 100 and against.likeness(store, todo[1])["ssim"] == 1


def test_tables_have_a_row_for_every_arm_and_intervals_over_prompts_and_seeds(run):
    _, todo, store, _, _ = run
    (table,) = take_tables(todo, store, store.finished(todo))
    assert (table["chunks"], table["height"], table["prompts"], table["seeds"]) == (5, 32, [PROMPT, "a ball"], [3])
    assert [row["arm"] for row in table["rows"]] == [*POLICIES, *(f"{policy} + {REUSE}" for policy in POLICIES)]
    for row in table["rows"]:
        assert row["takes"] == len(row["cells"]) == 2 and row["missing"] == row["against_missing"] == 0
        low, high = row["flicker"]["ci95"]
        assert row["flicker"]["n"] == 2 and low <= row["flicker"]["mean"] <= high
        assert ("psnr_db" in row) == (row["against"] is not None) == (row["reuse_name"] == REUSE)
        assert row["device_bytes"] > 0 and (row["reused_share"]["mean"] > 0) == (row["reuse_name"] == REUSE)
    assert json.loads(json.dumps(table, allow_nan=False)) == table


# --- a folder that something happens to -------------------------------------------------------------------------------


def test_a_finished_run_makes_nothing_again_and_more_seeds_add_to_it(run):
    plan, todo, store, _, out = run
    before = stamps(out)
    assert runner.execute(plan, todo, store, out) == [] and stamps(out) == before
    more = replace(plan, takes=replace(plan.takes, seeds=(3, 4), policies=POLICIES[:1], prompts=("a ball",)))
    assert sum(cell not in store for cell in runner.cells(more, [])) == 2


def test_damage_is_said_set_aside_and_made_good_and_a_missing_reference_is_said(model, tmp_path):
    words = line(tmp_path, model, "--reuse", "none", "--reuse", REUSE, "--json")
    first = invoke(*words)
    assert first.exit_code == 0, first.stderr
    keys = [row["cells"][0] for row in json.loads(first.stdout)["takes"][0]["rows"]]
    cells, before = tmp_path / "cells", stamps(tmp_path)
    (cells / f"{keys[0]}.json").write_text("{")  # not JSON any more
    (cells / keys[1] / "take.mp4").write_bytes(b"not a video")
    again = invoke(*words)
    assert again.exit_code == 0, again.stderr
    notes = json.loads(again.stdout)["notes"]
    assert [key in note and "set aside" in note for key, note in zip(keys, notes, strict=True)] == [True, True]
    assert "cannot be read" in notes[0] and "take.mp4 has changed" in notes[1]
    assert len(list(cells.glob("*.damaged-*"))) == 4 and set(stamps(tmp_path)) == set(before)
    assert json.loads(invoke(*words).stdout)["notes"] == []
    (cells / f"{keys[0]}.json").unlink()
    alone = invoke(*line(tmp_path, model, "--reuse", REUSE, "--json"))
    (row,) = json.loads(alone.stdout)["takes"][0]["rows"]
    assert row["takes"] == 1 and row["psnr_db"]["n"] == 1, "what was measured once stays"
    (cells / keys[1] / f"against-{keys[0]}.json").unlink()
    alone = json.loads(invoke(*line(tmp_path, model, "--reuse", REUSE, "--json")).stdout)
    (row,) = alone["takes"][0]["rows"]
    assert row["against_missing"] == 1 and "psnr_db" not in row
    assert any("no reference" in note for note in alone["notes"]), alone["notes"]


def test_a_full_disk_is_one_line_and_the_next_run_completes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a cache of bytecode would be cut short too
    words = line(tmp_path, model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        full = invoke(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert full.exit_code == 2 and full.stderr.startswith("error: cannot write") and full.stderr.count("\n") == 1
    assert list((tmp_path / "cells").iterdir()) == [], "nothing half-written is left"
    assert invoke(*words).exit_code == 0 and len(stamps(tmp_path)) == 1


def test_a_killed_run_leaves_whole_takes_only_and_the_next_one_completes(model, tmp_path):
    words = line(tmp_path, model, "--seeds", 60)
    process = subprocess.Popen(
        [sys.executable, "-m", "longtake", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 300
    while len(stamps(tmp_path)) < 3 if (tmp_path / "cells").exists() else True:
        assert process.poll() is None, "it was over before it could be killed"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = stamps(tmp_path)
    hidden = tmp_path / "cells" / f".{'0' * 16}.elsewhere-1"
    hidden.mkdir()  # of a run on another machine: not ours to remove
    assert invoke(*line(tmp_path, model, "--seeds", len(before) + 1)).exit_code == 0
    after = stamps(tmp_path)
    assert len(after) == len(before) + 1 and {name: after[name] for name in before} == before
    assert [path for path in (tmp_path / "cells").glob(".*")] == [hidden]
    for name in after:
        assert {path.name for path in (tmp_path / "cells" / name.removesuffix(".json")).iterdir()} == FILES


def test_a_policy_that_fails_costs_the_run_nothing(model, tmp_path):
    result = invoke(*line(tmp_path, model, "--policy", "window", "--policy", "window:frames=3,sink=3", "--json"))
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["finished"] == 1 and len(answer["notes"]) == 1
    assert answer["notes"][0].startswith("window:frames=3,sink=3: ")


# --- a matrix ---------------------------------------------------------------------------------------------------------


def test_a_file_and_options_say_the_same(model, tmp_path):
    file = tmp_path / "matrix.yaml"
    (tmp_path / "prompts.txt").write_text("a ball\n\n a square \n")
    file.write_text(
        f"models: ['{model}']\npolicies: window\nreuse: [none, '{REUSE}']\nprompts: prompts.txt\nseeds: 2\n"
        "chunks: 2\nsize: 48x32\nguidance: 1\n"
    )
    found = read_matrix(file)
    assert found == Matrix(
        (str(model),), ("window",), (), ("none", REUSE), ("a ball", "a square"), (0, 1), (), (2,), 32, 48, guidance=1
    )
    file.write_text("prompts: [a ball]\nseeds: [5, 9]\nseconds: 1.5\nreuse:\n")
    assert read_matrix(file) == Matrix(prompts=("a ball",), seeds=(5, 9), seconds=(1.5,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "prompt: [a]\nchunks: 2",
            "no key 'prompt'; a matrix of free takes (with protocols: of the procedural",
        ),
        ("protocols: [A]\nprompts: [a]", "no key 'prompts'; a matrix of the procedural world has protocols, models"),
        ("protocols: [A]\nseeds: [1, 2]", "seeds: [1, 2]; give how many scenes, one for the whole matrix"),
        ("protocols: [A]\nas_given: 1", "as_given: 1; give true or false"),
        ("prompts: [a]\nchunks: 0", "chunks: 0; give a number of chunks"),
        ("prompts: [a]\nchunks: two", "chunks: 'two'; give a number of chunks"),
        ("prompts: [a]\nchunks: true", "chunks: True; give a number of chunks"),
        ("prompts: [a]", "free takes need a length"),
        ("chunks: 2", "free takes need prompts"),
        ("prompts: ['']\nchunks: 2", "free takes need prompts, none of them empty"),
        ("prompts: [a]\nchunks: 2\nsize: big", "size: 'big'; write WIDTHxHEIGHT"),
        ("prompts: [a]\nchunks: 2\nsteps: [4, 8]", "steps: [4, 8]; give a number of steps, one for the whole matrix"),
        ("prompts: [a]\nchunks: 2\nseeds: 0", "seeds: 0; give at least 1"),
        ("prompts: [a\nchunks: 2", "line 2"),
        ("- a", "a matrix has keys and values"),
        ("prompts: none.txt\nchunks: 2", "none.txt cannot be read"),
    ],
)
def test_a_mistake_in_a_matrix_is_one_line(tmp_path, text, words):
    file = tmp_path / "m.yaml"
    file.write_text(text)
    result = invoke("compare", file, "-o", tmp_path / "out")
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert str(file) in result.stderr or "none.txt" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_matrix_with_protocols_is_the_options_it_stands_for(tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text(
        "protocols: [A, B]\nmodels: m\npolicies: [window, 'window:sink=0']\nbudgets: [9]\ncompressors: own\n"
        "seeds: 2\nframes: 12\nfree: 6\ngaps: [1, 2]\nagainst: window\nas_given: false\n"
    )
    assert read_matrix(file) == {
        "protocol": ["A", "B"], "model": ["m"], "policy": ["window", "window:sink=0"], "budget": [9],
        "compressor": ["own"], "seeds": 2, "frames": 12, "free": 6, "gap": [1, 2], "against": "window",
        "as_given": False,
    }  # fmt: skip
    file.write_text("protocols: [A]\nframes: 500\n")
    result = invoke("compare", file, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "--frames 500: give 12 to 400" in result.stderr, "checked as options are"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", 2], "--seconds is for free takes: give --prompt too, or a matrix"),
        (["--prompt", "a", "--chunks", 2, "--protocol", "A"], "--protocol is for the procedural world"),
        (["--prompt", "a"], "free takes need a length"),
        (["--prompt", "a", "--chunks", 0], "--chunks 0: give at least 1"),
        (["--prompt", "a", "--chunks", 2, "--reuse", "nobody"], "no reuse policy 'nobody'"),
        (["--export-vbench", "x"], "VBench and LPIPS are for free takes"),
        (["--prompt", "a", "--chunks", 2, "--import-vbench", "none.json"], "none.json: VBench results cannot be read"),
        (["--prompt", "a", "--chunks", 2, "--import-lpips", "none.json"], "none.json: LPIPS scores cannot be read"),
        (["m.yaml", "--seeds", 3], "--seeds beside m.yaml: the matrix says it all"),
        (["m.yaml"], "matrix m.yaml cannot be read"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(tmp_path, arguments, words):
    result = invoke("compare", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "out").exists()


def test_budgets_fit_every_policy_and_reuse_multiplies_them(host):
    shape = longtake.HistoryShape(1, 4, 32, 4, 4, 3)
    rows = take_arms(("window", "full"), (9, 12), ("none", REUSE, "none"), shape, SlidingWindow(21, 3), [])
    fitted = [("window", 9), ("window", 12), ("full", None)]
    assert [(arm.name, arm.budget and arm.policy.frames, arm.reuse_name) for arm in rows] == [
        (name, frames, reuse) for name, frames in fitted for reuse in ("", REUSE)
    ]
    (own,) = take_arms((), (), ("none",), shape, SlidingWindow(21, 3), [])
    assert own == Arm(spec(SlidingWindow(21, 3)), SlidingWindow(21, 3)) and "reuse" not in own.as_dict()
    assert rows[1].reference == rows[0] and rows[0].reference is None
    assert rows[1].as_dict()["reuse"] == reuses.describe(reuses.parse(REUSE))


# --- scores from elsewhere --------------------------------------------------------------------------------------------


def test_takes_are_laid_out_as_vbench_reads_them_and_its_scores_find_their_takes(run, tmp_path):
    _, todo, store, _, _ = run
    assert adapters.export_vbench(todo, store, tmp_path) == 8
    rows = sorted(path for path in tmp_path.iterdir())
    assert len(rows) == 4
    for row in rows:
        names = sorted(path.name for path in (row / "videos").iterdir())
        assert names == ["a ball and a square-0.mp4", "a ball-0.mp4"]
        assert read(row / "prompts.json") == {name: PROMPT if "square" in name else "a ball" for name in names}
    video = rows[0] / "videos" / "a ball-0.mp4"
    results = {
        "motion_smoothness": [0.9, [{"video_path": str(video), "video_results": 0.75}]],
        "dynamic_degree": [1.0, [{"video_path": str(video), "video_results": True}]],
    }
    file = tmp_path / "results_eval_results.json"
    file.write_text(json.dumps(results))
    assert adapters.import_vbench(file, todo, store) == 1
    (scored,) = [cell for cell in todo if adapters.imported_vbench(store.files(cell))]
    assert scored.setting.prompt == "a ball" and scored.seed == 3
    assert (store.files(scored) / "take.mp4").read_bytes() == video.read_bytes()
    row = next(row for row in take_tables(todo, store, store.finished(todo))[0]["rows"] if scored.key in row["cells"])
    assert row["vbench_motion_smoothness"] == {"n": 1, "mean": 0.75, "ci95": None}
    assert store.damage(scored) == "", "what is added later is no damage"
    (store.files(scored) / "vbench.json").unlink()
    file.write_text("[]")
    with pytest.raises(LongtakeError, match="these are not VBench results"):
        adapters.import_vbench(file, todo, store)
    file.write_text(json.dumps({"dynamic_degree": [1.0, [{"video_path": "a/b/c.mp4", "video_results": 1}]]}))
    with pytest.raises(LongtakeError, match="no score of a take of this comparison"):
        adapters.import_vbench(file, todo, store)


def test_pairs_for_lpips_go_out_and_scores_come_back(run, tmp_path):
    _, todo, store, _, _ = run
    assert adapters.export_lpips(todo, store, tmp_path) == 4
    pairs = read(tmp_path / "pairs.json")
    assert all((tmp_path / pair[key]).is_file() for pair in pairs for key in ("video", "reference_video"))
    compile((tmp_path / "score.py").read_text(), "score.py", "exec")
    scores = [{**pair, "lpips": 0.125, "lpips_per_frame": [0.1, 0.15]} for pair in pairs]
    (tmp_path / "lpips.json").write_text(json.dumps(scores))
    assert adapters.import_lpips(tmp_path / "lpips.json", todo, store) == 4
    rows = take_tables(todo, store, store.finished(todo))[0]["rows"]
    assert [row.get("lpips", {}).get("mean") for row in rows] == [None, None, 0.125, 0.125]
    (tmp_path / "lpips.json").write_text('[{"cell": "x"}]')
    with pytest.raises(LongtakeError, match="no LPIPS scores"):
        adapters.import_lpips(tmp_path / "lpips.json", todo, store)
    with pytest.raises(LongtakeError, match="no pairs for LPIPS"):
        adapters.export_lpips([cell for cell in todo if cell.arm.reuse is None], store, tmp_path)


# --- on Ray -----------------------------------------------------------------------------------------------------------


class LocalRay:
    """What `OnRay` uses of Ray, in this process: a worker answers when it is waited for, or dies if it is told to."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayActorError(RayError):
            pass

    def __init__(self, deaths: int = 0) -> None:
        self.deaths, self.workers, self.killed = deaths, 0, 0

    def remote(self, kind):
        ray = self

        class Handle:
            def __init__(self, *options) -> None:
                ray.workers += 1
                self.worker = object.__new__(kind)  # without its first lines, which are for a process of its own

            def __getattr__(self, name):
                return type("Method", (), {"remote": lambda _, *args: (self, name, args)})()

        return type("Kind", (), {"options": lambda _, **__: _, "remote": lambda _, *args: Handle(*args)})()

    def wait(self, answers, num_returns=1):
        return answers[:num_returns], answers[num_returns:]

    def get(self, answer):
        handle, name, args = answer
        if name == "do" and self.deaths:
            self.deaths -= 1
            raise self.exceptions.RayActorError("gone")
        return getattr(handle.worker, name)(*args)

    def kill(self, worker) -> None:
        self.killed += 1


def test_work_of_a_dead_worker_goes_to_another_and_groups_stay_together(tmp_path):
    jobs = [Job(i, i % 2, partial(str.upper, f"job {i}")) for i in range(6)]
    ray = LocalRay(deaths=2)
    done = {job.number: answer for job, answer in OnRay(ray, 2, {}, tmp_path).run(jobs)}
    assert done == {i: f"JOB {i}" for i in range(6)} and ray.workers == 4 and ray.killed == 2
    failed = dict(OnRay(LocalRay(deaths=3), 1, {}, tmp_path).run(jobs[:1]))
    assert "its worker died, 3 times" in failed[jobs[0]]
    with pytest.raises(LongtakeError, match="does not see"):
        list(OnRay(LocalRay(), 1, {}, tmp_path / "elsewhere").run(jobs))
