"""`longtake bench packforcing` on a shape of seconds: what it says, and that it says it of the right thing."""

import json

import pytest
from typer.testing import CliRunner

from longtake import LongtakeError, PackForcing
from longtake.cli import app
from longtake.evaluate import bench_suite
from longtake.evaluate.bench_packforcing import run

pytestmark = pytest.mark.usefixtures("quick", "idle")

POLICY = PackForcing(sink=1, top_k=2, archive=4)


@pytest.fixture(scope="module", params=["scratch", "resident"])
def report(request):
    return run("cpu-micro", chunks=12, full_chunks=6, policy=POLICY, residency=request.param, repeats=2,
               blocks=(2, 4), force=True)  # fmt: skip


def test_tokens_and_bytes_are_those_of_the_policy(report):
    small = report.counts["compressed_tokens"]  # of 2 × 2 × 3 tokens: one
    assert small == 1 and report.counts["attended_tokens"] == 3 * 12 + 2 * small
    course = report.courses["packforcing"]
    assert len(course.seconds) == 12 and course.attended[-1] == course.attended[-4]
    full = report.courses["full history"]
    assert full.attended == [12 * (i + 1) for i in range(6)]


def test_the_window_it_is_compared_to_has_the_same_bytes(report):
    budget, frames = report.settings["budget_bytes"], report.settings["window"]["frames"]
    frame = 4 * 2 * 2 * 12 * 4 * 2  # tokens, K and V, heads, channels, bytes, layers
    assert frames * frame <= budget < (frames + 1) * frame


def test_both_scores_agree_and_every_part_has_a_share(report):
    assert max(report.counts["score_agreement_2"], report.counts["score_agreement_4"]) < 1e-4
    names = {f.name: f for f in report.figures}
    for part in ("selection", "compression", "view (gather and rotate)"):
        assert 0 < names[f"{part} / chunk"].median < 1
    assert "re-positioning (view less a plain copy) / chunk" in names
    assert names["frames a second"].median > 0 and report.counts["sustained_frames_per_second"] > 0
    assert [row.what for row in report.missing] == ["gpu-wan-1.3b"]
    assert [r.resource for r in report.reached] == ["float32", "copy", "copy"]


def test_the_command_writes_its_figures(tmp_path):
    command = ["bench", "packforcing", "--shape", "cpu-micro", "--chunks", "9", "--full-chunks", "3", "--force",
               "--policy", "packforcing:sink=1,top_k=2,archive=4", "--out", str(tmp_path), "--json"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "packforcing-cpu.json").read_text())
    assert written["benchmark"] == "packforcing" and written["settings"]["policy"]["top_k"] == 2
    again = bench_suite.read(tmp_path / "packforcing-cpu.json")
    assert again.as_dict() == written and "| window of the same bytes |" in again.markdown()
    assert (tmp_path / "packforcing-cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_too_short_a_take_is_refused_with_what_would_do():
    with pytest.raises(LongtakeError, match="--chunks 23 or more"):
        run("cpu-micro", chunks=10, force=True)


def test_another_policy_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["bench", "packforcing", "--policy", "window", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "packforcing" in result.output
