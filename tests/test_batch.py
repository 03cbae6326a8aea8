"""A file of takes is made exactly once, whatever is wrong with some of its lines and whoever is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import longtake
from longtake.cli import app
from longtake.cluster.jobs import DEFAULT_MODEL, DEFAULT_SECONDS, Job, read_lines
from longtake.cluster.making import RECORD, VIDEO
from longtake.cluster.results import Results
from longtake.commands import options
from longtake.video import read_video
from tests.lumos import write_folder
from tests.serving import until

BALL = {"prompt": "a red ball bouncing on a dark background", "chunks": 1, "seed": 1}
SQUARE = {"prompt": "a green square moving on a light background", "chunks": 2, "policy": "window:frames=6"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["batch", *(str(a) for a in arguments), "--device", "cpu", "--json"])


def batch(*arguments: object) -> tuple[int, dict]:
    done = invoked(*arguments)
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout)


def inodes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_ino for p in (folder / "takes").rglob("*.*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A batch with good lines, the same line twice, and one that shows to be wrong when it is made."""
    folder = tmp_path_factory.mktemp("batch")
    file = write(folder / "prompts.jsonl", BALL, "", SQUARE | {"id": "square"}, BALL, BALL | {"switch": [[9, "late"]]})
    return file, folder / "out", *batch(file, "-o", folder / "out")


def test_every_good_line_is_made_and_one_that_fails_is_told_with_its_number(finished):
    _, out, code, report = finished
    assert {row["line"]: row["status"] for row in report["lines"]} == {1: "made", 3: "made", 4: "kept", 5: "failed"}
    assert code == 1 and "last chunk" in report["lines"][-1]["problem"]
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == report["lines"]
    assert not (out / ".work").exists()


def test_what_is_wrong_with_lines_as_they_stand_is_told_at_once_and_nothing_is_started(finished, tmp_path):
    _, out, _, _ = finished
    wrong = {
        2: '{"prompt": ', 4: BALL | {"policy": "windw"}, 5: BALL | {"size": "100000000x16"},
        6: BALL | {"size": "60x64"}, 7: BALL | {"model": "tiny-shape"},
        8: BALL | {"model": "tiny-skyreels", "size": "61x64"}, 9: SQUARE | {"id": "square", "seed": 9},
        10: BALL | {"model": str(write_folder(tmp_path / "lumos")), "size": "64x40"},
    }  # fmt: skip
    said = {
        2: "not JSON", 4: "windw", 5: "WIDTHxHEIGHT", 6: "60x64", 7: "model 'tiny-shape'", 8: "61x64", 9: "another id",
        10: "64x40",
    }  # fmt: skip
    before = inodes(out)
    file = write(tmp_path / "p.jsonl", BALL | {"seed": 77}, *(wrong.get(number, "") for number in range(2, 11)))
    for where in (out, tmp_path / "new"):
        done = invoked(file, "-o", where)
        told = [number for number in wrong if where == out or number != 9]  # there the id is free
        assert done.exit_code == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
        assert f"{len(told)} lines are wrong, so nothing was started" in done.stderr
        parts = re.split(r"line (\d+): ", done.stderr)[1:]
        assert [int(number) for number in parts[::2]] == told
        assert all(said[number] in part for number, part in zip(told, parts[1::2], strict=True))
    assert inodes(out) == before and not (tmp_path / "new").exists()


def test_a_result_is_the_take_that_the_library_makes_and_says_where_it_came_from(finished):
    _, out, _, _ = finished
    record = json.loads((out / "takes" / "square" / RECORD).read_text())
    host = longtake.load(record["model"], device="cpu")
    take = longtake.Session(host, longtake.SlidingWindow(6), prompt=SQUARE["prompt"], chunks=2)
    assert sum(len(chunk.frames) for chunk in take) == record["frames"]
    assert len(read_video(out / "takes" / "square" / VIDEO)) == record["frames"]
    assert record["policy"].startswith("window:frames=6") and record["job"]["prompt"] == SQUARE["prompt"]
    assert record["versions"]["longtake"] and record["worker"]["pid"] == os.getpid() and record["date"]
    assert len({json.loads(p.read_text())["latents_sha256"] for p in out.glob(f"takes/*/{RECORD}")}) == 2


def test_running_again_makes_nothing_twice_and_tells_the_figures_of_the_run_that_did(finished):
    file, out, _, first = finished
    before = inodes(out)
    code, report = batch(file, "-o", out)
    assert report["made"] == 0 and report["kept"] == 3 and code == 1
    assert inodes(out) == before
    assert (report["video_seconds"], report["work_seconds"]) == (0, 0)  # of this run
    figures = [[(row[key]) for key in ("name", "frames", "seconds", "video_seconds")] for row in report["lines"][:3]]
    assert figures == [
        [(row[key]) for key in ("name", "frames", "seconds", "video_seconds")] for row in first["lines"][:3]
    ]
    assert [row["frames"] for row in report["lines"][:3]] == [9, 21, 9]
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == report["lines"]


def test_a_kept_take_whose_record_has_no_figures_is_told_without(tmp_path):
    job = Job.of(BALL, {})
    with Results(tmp_path / "out") as results:
        assert results.commit_bytes(b"video", {"digest": job.digest}, job)
    _, report = batch(write(tmp_path / "p.jsonl", BALL), "-o", tmp_path / "out")
    assert report["lines"] == [
        {"line": 1, "status": "kept", "name": job.name, "problem": "its take.json has no figures"}
    ]


def test_an_id_names_one_take_for_ever(finished, tmp_path):
    _, out, _, _ = finished
    file = write(
        tmp_path / "other.jsonl", SQUARE | {"id": "square", "seed": 9}, SQUARE | {"id": "two"}, BALL | {"id": "two"}
    )
    lines = read_lines(file, {})
    assert lines[2].job is None and "line 2" in lines[2].problem
    done = invoked(write(file, SQUARE | {"id": "square", "seed": 9}), "-o", out)
    assert done.exit_code == 2 and "line 1" in done.stderr and "another id" in done.stderr


def test_options_say_what_lines_leave_out(tmp_path):
    file = write(
        tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a", "seconds": 2}, {"prompt": "a", "policy": "full"}
    )
    assert (DEFAULT_MODEL, DEFAULT_SECONDS) == (options.DEFAULT_MODEL, options.DEFAULT_SECONDS)
    jobs = [line.job for line in read_lines(file, {"chunks": 3, "policy": "window", "seconds": None})]
    assert [(j.chunks, j.seconds) for j in jobs] == [(3, None), (None, 2.0), (3, None)]
    assert [j.policy for j in jobs] == ["window", "window", "full"]
    assert len({job.name for job in jobs}) == 3


@pytest.mark.parametrize("wrong", [
    {}, {"prompt": " "}, {"prompt": 3}, {"prompt": "a", "sed": 1}, {"prompt": "a", "seed": True},
    {"prompt": "a", "seed": -1}, {"prompt": "a", "chunks": 1.5}, {"prompt": "a", "chunks": 0},
    {"prompt": "a", "chunks": 1, "seconds": 1}, {"prompt": "a", "id": "../x"}, {"prompt": "a", "id": ".hidden"},
    {"prompt": "a", "reuse": "n"}, {"prompt": "a", "switch": ["b"]}, {"prompt": "a", "switch": [[-1, "b"]]},
    {"prompt": "a", "image": "/nowhere.png"}, {"prompt": "a", "switch_mode": "x"}, ["a"], "a", None, 3,
])  # fmt: skip
def test_a_wrong_line_is_refused_before_anything_is_made(wrong):
    with pytest.raises(longtake.LongtakeError):
        Job.of(wrong, {})


def test_two_batches_do_not_write_into_one_folder(tmp_path):
    with Results(tmp_path / "out"), pytest.raises(longtake.LongtakeError, match="another batch"):
        Results(tmp_path / "out")


def test_of_two_makers_of_one_take_the_first_counts(tmp_path):
    job = Job.of({"prompt": "a", "chunks": 1}, {})
    record = {"digest": job.digest}
    with Results(tmp_path / "out") as results:
        assert results.commit_bytes(b"first", record, job)
        assert not results.commit_bytes(b"second", record, job)
        assert (results.takes / job.name / VIDEO).read_bytes() == b"first"


def test_a_killed_batch_loses_the_line_in_flight_and_makes_the_rest_once(tmp_path):
    out = tmp_path / "out"
    file = write(tmp_path / "p.jsonl", *(BALL | {"seed": seed} for seed in range(3)), BALL | {"chunks": 10**6})
    command = [sys.executable, "-m", "longtake", "batch", str(file), "-o", str(out), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        until(lambda: len(list(out.glob("takes/*"))) == 3 and any(out.glob(".work/*")), 120)
        process.send_signal(signal.SIGKILL)
    before = inodes(out)
    assert len(before) == 6  # whole results only
    write(file, *(BALL | {"seed": seed} for seed in range(5)))
    code, report = batch(file, "-o", out)
    assert (code, report["kept"], report["made"]) == (0, 3, 2)
    assert before.items() <= inodes(out).items() and len(inodes(out)) == 10 and not (out / ".work").exists()
