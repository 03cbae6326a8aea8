"""The demo makes comparable takes, one page that opens from disk, and a folder that is complete or not there."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import longtake
from longtake import demo as module
from longtake import demo_page
from longtake.cli import app
from longtake.demo import check_out, label_of, line_up, make_demo
from longtake.demo_page import bytes_text, nice_ticks, page
from longtake.policies import FullHistory, SlidingWindow
from longtake.video import Mp4Writer, read_video
from tests.test_cli import (
    ENVIRONMENT,
    write_model,
    written,  # noqa: F401 - a fixture
)

EVIL = '<script>alert(1)</script> & "red"'


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return longtake.load(write_model(tmp_path_factory.mktemp("model") / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def made(host, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, make_demo(out, host, prompts=["red", EVIL], seconds=4)


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "poster")]

    def handle_data(self, data):
        self.text += data


def test_every_prompt_meets_every_policy_for_the_same_length(host, made):
    out, result = made
    labels = ["full history", "window 6, sink 2", "window 6, sink 2, slots", "window 6, no sink"]
    assert [p["label"] for p in result["policies"]][:4] == labels
    pairs = {(t["prompt"], t["policy"]) for t in result["takes"]}
    assert pairs == {(prompt, p["label"]) for prompt in ("red", EVIL) for p in result["policies"]}
    for take in result["takes"]:
        frames = read_video(out / take["video"])
        assert frames.shape == (37, 16, 32, 3)  # 4 s of 8 a second, in whole chunks of 8 after the first
        assert np.asarray(Image.open(out / take["poster"])).shape == (16, 32, 3)
    assert result["seconds"] == 37 / 8 and result["shortened_from"] is None


def test_takes_are_the_ones_the_library_makes_with_that_policy_and_seed(host, tmp_path, written):  # noqa: F811
    policies = [FullHistory(), SlidingWindow(6, sink=0)]
    result = make_demo(tmp_path / "out", host, prompts=["red", "kite"], policies=policies, seconds=4, seed=3)
    expected = []
    for row, (prompt, policy) in zip(result["takes"], product(("red", "kite"), policies), strict=True):
        take = longtake.generate(host, chunks=result["chunks"], policy=policy, prompt=prompt, seed=3)
        expected += [chunk.frames for chunk in take]
        assert (row["prompt"], row["policy"]) == (prompt, label_of(policy))
        assert row["memory"] == take.memory()
        assert row["chunks"][-1]["attended_tokens"] == take.stats.last.attended_tokens
    assert torch.equal(torch.cat(written), torch.cat(expected))
    assert not torch.equal(torch.cat(expected[:5]), torch.cat(expected[5:10]))  # the policies do differ


def test_figures_add_up(made):
    _, result = made
    for policy in result["policies"]:
        takes = [t for t in result["takes"] if t["policy"] == policy["label"]]
        seconds = sum(c["seconds"] for t in takes for c in t["chunks"])
        assert policy["chunks_per_second"] == pytest.approx(len(takes) * result["chunks"] / seconds)
        assert policy["realtime_factor"] == pytest.approx(len(takes) * result["seconds"] / seconds)
        assert len(policy["curves"]["seconds"]) == result["chunks"]
        assert policy["curves"]["end"][-1] == result["seconds"]
    full, window = result["policies"][:2]
    assert full["history_bytes"] > window["history_bytes"] and full["attended_tokens"] > window["attended_tokens"]
    assert result["wall_seconds"] > sum(t["seconds"] for t in result["takes"])
    assert result["machine"]["usable_cores"] >= 1 and result["threads"] in (1, torch.get_num_threads())


def test_the_page_opens_from_disk_and_refers_to_nothing_else(made):
    out, result = made
    html = (out / "index.html").read_text()
    parsed = Page(html)
    assert "http" not in html and "//" not in re.sub(r"<script>.*</script>", "", html, flags=re.S)
    assert {link for link in parsed.links if link} <= set(os.listdir(out))
    assert parsed.links.count("demo.json") == 1
    assert [t["video"] for t in result["takes"]] == [link for link in parsed.links if link.endswith(".mp4")]
    assert sorted(result["files"]) == sorted(os.listdir(out))
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(result))
    assert "width=device-width" in html and "prefers-color-scheme:dark" in html


def test_prompts_are_text_on_the_page_never_markup(made):
    parsed = Page((made[0] / "index.html").read_text())
    assert parsed.tags.count("script") == 1  # the page's own
    assert EVIL in parsed.text
    about = {"about": "made by `make <it>`"}
    parsed = Page(page(made[1] | {"model": made[1]["model"] | about}))
    assert "made by make <it>" in parsed.text and "it" not in parsed.tags


def test_lines_of_a_chart_differ_in_colour_or_dashes_and_neighbours_in_both():
    styles = [demo_page._style(i).split() for i in range(24)]
    assert len({tuple(style) for style in styles}) == 24
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(styles))


def test_charts_are_well_formed_with_a_point_for_each_policy_and_chunk(made):
    out, result = made
    drawings = re.findall(r"<figure><figcaption>.*?(<svg .*?</svg>)", (out / "index.html").read_text(), re.S)
    charts = [xml.etree.ElementTree.fromstring(d) for d in drawings]
    assert len(charts) == 3
    for chart in charts:
        assert len(chart.findall("polyline")) == len(result["policies"])
        assert len(chart.findall("circle")) == len(result["policies"]) * result["chunks"]
        for circle in chart.findall("circle"):
            assert 60 <= float(circle.get("cx")) <= 380 and 12 <= float(circle.get("cy")) <= 230 - 30
        trained = [line for line in chart.findall("line") if line.get("class") == "mark"]
        assert len(trained) == 1  # these takes are longer than the training clips


def test_the_page_says_what_is_missing_shortened_or_disturbed(made):
    _, result = made
    changed = {"shortened_from": 17, "others_busy": 0.5, "left_out": [{"policy": "x", "why": "it needs <y>"}]}
    text = Page(page(result | changed)).text
    assert "instead of 17" in text and "50%" in text and "Not here: x (it needs <y>)" in text
    text = Page(page(result | {"others_busy": 0.0})).text
    assert "instead of" not in text and "Other processes" not in text


def test_the_contact_sheet_has_a_row_for_each_take(made):
    out, result = made
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.height == len(result["takes"]) * (128 + 20 + 4) + 20
    assert sheet.width >= 8 * 256


def test_an_earlier_demo_is_replaced_and_nothing_else(host, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder will do
    make_demo(out, host, prompts=["red", "kite"], policies=[SlidingWindow(4, 0)], seconds=1)
    make_demo(out, host, prompts=["red"], policies=[SlidingWindow(4, 0)], seconds=1)
    files = ["1-1-window-4-no-sink.mp4", "1-1-window-4-no-sink.png", "contact_sheet.png", "demo.json", "index.html"]
    assert sorted(os.listdir(out)) == files and os.listdir(tmp_path) == ["out"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(longtake.LongtakeError, match=r"holds what no demo wrote \(thesis.txt\)"):
        make_demo(out, host, prompts=["red"], seconds=1)
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"made_by": "longtake demo", "files": ["demo.json"]}'])
def test_a_folder_that_only_looks_like_a_demo_is_not_replaced(content, tmp_path):
    (tmp_path / "demo.json").write_text(content)
    (tmp_path / "other").write_text("")
    with pytest.raises(longtake.LongtakeError, match="choose another folder"):
        check_out(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), longtake.LongtakeError("full"), OSError(28, "No space left")])
def test_a_demo_that_does_not_finish_leaves_the_earlier_one(error, host, tmp_path, monkeypatch):
    out, threads = tmp_path / "out", torch.get_num_threads()
    make_demo(out, host, prompts=["red"], policies=[FullHistory()], seconds=1)
    before = (out / "demo.json").read_bytes()
    calls = []

    def failing(self, frames):
        calls.append(1)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(Mp4Writer, "write", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else longtake.LongtakeError):
        make_demo(out, host, prompts=["red"], policies=[FullHistory()], seconds=3)
    assert (out / "demo.json").read_bytes() == before and os.listdir(tmp_path) == ["out"]
    assert torch.get_num_threads() == threads


def test_takes_are_shortened_to_what_the_machine_makes_in_time(host, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 0.0)
    result = make_demo(tmp_path / "out", host, prompts=["red"], policies=[SlidingWindow(4, 0)])
    assert result["chunks"] == 4  # still one beyond the training length of three
    assert result["shortened_from"] == 13  # 12 s are 96 frames, 5 of the first chunk and 8 of each other
    assert "instead of 13" in Page((tmp_path / "out" / "index.html").read_text()).text


def test_the_line_up_leaves_out_what_cannot_be_fitted_and_says_why(host, monkeypatch):
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Fitted(SlidingWindow):
        name: ClassVar[str] = "fitted"

    @dataclass(frozen=True)
    class Unfit(FullHistory):
        name: ClassVar[str] = "unfit"

    for cls in (Fitted, Unfit):
        cls.__module__ = "longtake.policies.test"
    monkeypatch.setattr(module, "available", lambda: {"fitted": Fitted, "unfit": Unfit})
    monkeypatch.setattr(module, "METHODS", ("fitted", "unfit"))
    entries, left_out = line_up(host)
    assert [label for label, _ in entries][-1] == "fitted (frames 6)"  # the same bytes as the model's window
    assert left_out == [{"policy": "unfit", "why": "unfit cannot be fitted to a byte budget"}]


def test_ticks_are_round_and_reach_the_top():
    for top in (0.003, 0.013, 0.5, 1, 7.3, 99, 100, 4.2e6):
        ticks = nice_ticks(top)
        assert 3 <= len(ticks) <= 6 and ticks[0] == 0 and ticks[-2] < top <= ticks[-1] * (1 + 1e-9)
    assert [bytes_text(x) for x in (0, 999, 2_080_512, 3e9)] == ["0 B", "999 B", "2.08 MB", "3 GB"]


def test_the_command_needs_no_arguments_and_prints_where_things_are(tmp_path):
    """Real model, real process; a short length keeps the test short."""
    command = [sys.executable, "-m", "longtake", "demo", "--seconds", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "longtake-demo"
    assert f"open {out / 'index.html'}" in done.stdout and (out / "index.html").is_file()
    result = json.loads((out / "demo.json").read_text())
    assert result["model"]["name"] == "tiny-shapes" and len({t["prompt"] for t in result["takes"]}) == 3
    assert len(result["policies"]) >= 4
    for policy in result["policies"]:
        assert policy["label"] in done.stdout
    assert "Traceback" not in done.stderr


def test_a_policy_given_twice_is_compared_once_and_said_to_be(host, tmp_path, monkeypatch):
    monkeypatch.setattr("longtake.hosts.loading.load", lambda *_, **__: host)
    twice = ["--policy", "window:frames=6,sink=2", "--policy", "full", "--policy", "window:sink=2,frames=6"]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", str(out), "--seconds", "0.5", "--prompt", "red", *twice, "--json"])
    assert result.exit_code == 0, result.output
    assert [p["label"] for p in json.loads(result.stdout)["policies"]] == ["window 6, sink 2", "full history"]
    assert "note: --policy window:sink=2,frames=6 is given twice" in result.stderr


def test_policies_that_could_not_be_told_apart_are_refused(host, tmp_path):
    def another() -> SlidingWindow:
        return type("Mine", (SlidingWindow,), {"name": ""})(6, 2)

    with pytest.raises(longtake.LongtakeError, match="both called Mine"):
        make_demo(tmp_path / "out", host, prompts=["red"], policies=[another(), another()], seconds=0.5)


def test_wrong_input_is_one_line_and_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    for arguments, words in (
        (["full"], "full holds what no demo wrote"),
        (["full/mine.txt"], "is not a folder"),
        (["no/where"], "there is no folder no"),
        (["--policy", "best"], "no policy 'best'"),
        (["--seconds", "0"], "0 seconds"),
        (["--seconds", "inf"], "finite length above 0"),
        (["--dtype", "float64"], "float32, bfloat16, float16"),
        (["--model", "nowhere"], "no model 'nowhere'"),
    ):
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert result.exit_code == 2 and result.stdout == ""
        assert len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert os.listdir(tmp_path) == ["full"] and os.listdir("full") == ["mine.txt"]
