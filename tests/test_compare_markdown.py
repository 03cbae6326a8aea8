"""Tables of a comparison come from its summary, and stand where a document asks for them."""

import json

import pytest

from longtake.errors import LongtakeError
from longtake.evaluate.bench_suite import fill
from longtake.evaluate.compare.markdown import markdown


def row(name: str, budget: int | None, mean: float, control: str = "") -> dict:
    estimate = {"n": 30, "mean": mean, "ci95": [mean - 0.1, mean + 0.1]}
    return {
        "name": name, "control": control, "budget": budget, "events": 30, "attended_tokens": 192,
        "device_bytes": 2**20, "total_bytes": 2**21, "recall_colour_by_gap": {"8": {**estimate, "n": 9}},
        "recall_colour": estimate, "recall_colour_repainted": {"n": 0, "mean": None, "ci95": None},
    }  # fmt: skip


SUMMARY = {
    "command": "longtake compare -o runs/x", "notes": ["odd: it cannot be fitted"], "made_by": [
        {"commit": "0123456789abcdef", "dirty": False, "cpu": "abacus", "gpu": None, "torch": "2.9", "cells": 5,
         "from": "2026-11-20T09:00", "to": "2026-11-21T09:00"},
        {"commit": "fedcba9876543210", "dirty": True, "cpu": "abacus", "gpu": None, "torch": "2.9", "cells": 1,
         "from": "2026-11-19T09:00", "to": "2026-11-19T09:00"},
    ],
    "tables": [{"model": "some/where/tiny", "protocol": "A", "rows": [
        row("truth", None, 1.0, "truth"), row("window", 2048, 0.25), row("window", 4096, 0.5),
    ]}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "tiny.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def test_a_block_is_filled_from_the_summary_and_again_is_the_same(folder):
    filled = fill("before\n<!-- compare:tiny -->\nold\n<!-- /compare:tiny -->\nafter", folder)
    assert filled.startswith("before\n<!-- compare:tiny -->\n") and filled.endswith("<!-- /compare:tiny -->\nafter")
    assert (
        "| `window` | 2 | 30 | 0.25 [0.15, 0.35] |" in filled and "| `window` | 4 | 30 | 0.50 [0.40, 0.60] |" in filled
    )
    assert "| *truth* |  | 30 | 1.00 [0.90, 1.10] |" in filled and "old" not in filled
    assert "`tiny`, protocol A" in filled and "Not in the table: odd: it cannot be fitted." in filled
    assert (
        "| colour recalled at gap | budget, KiB | 8 |" in filled
        and "| `window` | 2 | 0.25 [0.15, 0.35] of 9 |" in filled
    )
    assert "| 192 | 1.0 | 2.0 |" in filled
    assert fill(filled, folder) == filled


def test_every_commit_that_cells_come_from_is_told(folder):
    filled = fill("<!-- compare:tiny -->\n<!-- /compare:tiny -->", folder)
    assert (
        "`longtake compare -o runs/x`: abacus, 2026-11-19 to 2026-11-21, torch 2.9, 5 cells at 0123456789, "
        "1 cells at fedcba9876 with uncommitted changes."
    ) in filled


def test_one_scene_has_no_interval_and_a_difference_is_bold_if_it_is_sure(folder):
    one = row("window", 4096, 0.5) | {"recall_colour": {"n": 30, "mean": 0.5, "ci95": None}}
    one["against_chosen"] = {"other": "mine @ 4 KiB", "difference": 0.25, "ci95": None, "p_holm": 0.04}
    text = markdown(SUMMARY | {"tables": [{"model": "tiny", "protocol": "A", "rows": [one]}]})
    assert "| `window` | 4 | 30 | 0.50 |" in text and "colour, less that of `mine`" in text and "| **+0.25** |" in text


def test_a_brief_block_has_each_policy_at_its_largest_budget(folder):
    filled = fill("<!-- compare:tiny brief -->\n<!-- /compare:tiny -->", folder)
    assert "| `window` | 4 |" in filled and "| `window` | 2 |" not in filled and "| *truth* |" in filled


def test_a_missing_summary_is_told(folder):
    with pytest.raises(LongtakeError, match=r"no .*other\.json: copy the summary\.json"):
        fill("<!-- compare:other -->\n<!-- /compare:other -->", folder)
