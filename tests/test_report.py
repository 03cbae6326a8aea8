"""The page of a comparison says everything, hides nothing, and opens anywhere."""

import gzip
import html
import json
import re
from base64 import b64decode

import pytest

from longtake.evaluate import report
from longtake.evaluate.report.files import BLOCKS, POINTS, read_take, thin
from tests.compared import ARMS, EVIL, FRAMES, NO, films, made, world


def data(page: str, name: str):
    return json.loads(gzip.decompress(b64decode(re.search(rf"<script type=text/plain id='{name}'>([^<]*)<", page)[1])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def summary(folder):
    return made(folder)


@pytest.fixture(scope="module")
def page(summary, folder):
    return report.page(summary, folder)


def test_everything_is_in_the_file_and_every_string_is_escaped(page):
    text = re.sub("<script type=text/plain[^<]*", "", page).replace(html.escape(EVIL), "")
    assert "://" not in text and "src=" not in text and "default-src 'none'" in text
    assert "<img" not in page and html.escape(EVIL) in page
    assert page.count("type=text/plain id='mp4-") == 8 and "All 8 videos are inside this file" in page
    assert len(re.findall(r"<script>", page)) == 1, "the script of the page, and no other"


def test_every_mean_stands_with_its_interval_and_the_best_is_marked(page):
    quality = page.split("id='takes-0-quality'")[1].split("</table>")[0]
    assert "<b>−1</b><small>−1.1 to −0.9</small>" in quality
    assert re.search(r"data-value='-1.0' class=best><b>−1</b>", quality), "nearest to 0"
    assert re.search(r"data-value='1.0' class=best><b>1</b>", quality), "least flicker"
    assert quality.count("is its own reference") == 3 and "31.5" in quality


def test_one_take_has_no_interval(summary, folder):
    table = {**summary["takes"][0], "rows": [{**summary["takes"][0]["rows"][0]}]}
    table["rows"][0] |= {"takes": 1, "flicker": {"n": 1, "mean": 1.0, "ci95": [1.0, 1.0]}}
    text = report.page({**summary, "takes": [table]}, folder)
    assert "<b>1</b><small>one, no interval</small>" in text and "there are no intervals" in text


def test_what_is_missing_is_said(tmp_path):
    summary = made(tmp_path, missing=(2,))
    summary["takes"][0]["rows"][3] |= {"psnr_db": NO, "against_missing": 2}
    (tmp_path / "cells" / f"{0:016x}" / "sight.json").write_text("{")
    (tmp_path / "cells" / f"{1:016x}" / "take.mp4").unlink()
    (tmp_path / "cells" / f"{3:016x}.json").write_text("[]")
    text = report.page(summary, tmp_path)
    assert "7 of 8 cells are finished" in text
    assert "window:frames=6: 1 of 2 takes are missing." in text and "<small class=bad>1 missing</small>" in text
    assert "could not read sight.json" in text and "could not read take.mp4" in text
    assert f"{3:016x} (prompt unknown): could not read {3:016x}.json" in text
    assert "no reference</small>" in text and "2 of 2 takes have no reference (packforcing)" in text


def test_without_the_folder_there_are_tables_and_a_word_about_the_rest(summary):
    text = report.page(summary)
    assert "The folder of the takes was not at hand" in text and "data-view=player" not in text
    assert "<table id='takes-0-quality'>" in text and "data-view=tradeoff" in text and "No videos" in text


def test_nothing_finished_is_a_page_too():
    text = report.page({"command": "longtake compare", "notes": [], "cells": 3, "finished": 0, "tables": []})
    assert "No cell is finished" in text and "0 of 3 cells" in text


def test_videos_beyond_the_cap_are_linked_a_whole_group_at_a_time(summary, folder):
    sizes = [(folder / "cells" / f"{key:016x}" / "take.mp4").stat().st_size for key in range(8)]
    text = report.page(summary, folder, sum(sizes[::2]))
    assert text.count("id='mp4-") == 4 and "4 more are links into the folder cells beside it" in text
    shown = {key: take["video"] for key, take in data(text, "takes-0-data")["takes"].items()}
    assert [video.get("src") for video in shown.values()].count(None) == 4
    assert shown[f"{1:016x}"]["src"] == f"cells/{1:016x}/take.mp4" and (folder / shown[f"{1:016x}"]["src"]).is_file()


def test_long_takes_are_thinned_and_say_so(summary, folder, tmp_path):
    assert thin([1.0, 3.0, None, None, 5.0], 3) == {"every": 2, "values": [2.0, None, 5.0]}
    assert len(thin(list(range(10 * POINTS + 1)))["values"]) <= POINTS
    own = tmp_path / "cells" / "k"
    own.mkdir(parents=True)
    rows = [{"index": i, "blocks": [{}] * 511} for i in range(2 * BLOCKS // 512)]
    (own / "sight.json").write_text(json.dumps({"chunks": rows}))
    take = read_take(tmp_path, "k")
    assert take.sight["every"] == 2 and take.sight["of"] == len(rows) and take.sight["chunks"][1]["index"] == 2
    whole = read_take(folder, f"{0:016x}")
    assert whole.sight["every"] == 1 and not whole.wrong and len(whole.curves["brightness"]["values"]) == FRAMES


def test_decisions_and_sight_are_there_where_they_were_made(page):
    assert page.count("id='decisions-") == 2 and page.count("id='sight-") == 2 * len(ARMS)
    assert data(page, f"decisions-{6:016x}")[1] == [0, 1, 1, 0.1, 0.1, 899.0, "still"]
    assert data(page, f"sight-{2:016x}")["chunks"][5]["blocks"][0]["frame"] == 9


def test_a_world_whose_cells_kept_no_video_has_no_player(tmp_path):
    assert "world-0-films-data" not in report.page(world(), tmp_path)
    keys = films(tmp_path)
    text = report.page(world(keys), tmp_path)
    assert "All 4 videos are inside this file" in text
    shown = data(text, "world-0-films-data")
    assert shown["rows"][0]["arm"] == "truth" and list(shown["takes"]) == keys


def test_the_world_has_its_tables_and_its_chance():
    text = report.page(world())
    assert "Chance: colour 0.125" in text and "Admitted measures" in text and "p 0.001" in text
    assert "too few" not in text and "<tr class=control><th scope=row>truth" in text
    drawn = data(text, "world-0-data")
    assert [row["arm"] for row in drawn["rows"]] == ["full", "window @ 9 KiB", "window @ 21 KiB"], "no price of truth"
    assert [gap for gap, *_ in drawn["rows"][0]["gaps"]] == [1, 16], "two events are no point"
