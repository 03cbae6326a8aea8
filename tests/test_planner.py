"""The planner's arithmetic against the numbers the papers and their models give."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from longtake import FullHistory, LastFrames, LongtakeError, PackCache, SlidingWindow
from longtake.cli import app
from longtake.planner import PlanRequest, models, plan
from longtake.planner.lumos import SHAPES, CostModel
from longtake.planner.walk import Layout, walk

LUMOS = CostModel(SHAPES["lumos-1-3b"], 672, 384, 50)


def lumos(**options: Any) -> dict[str, Any]:
    return plan(PlanRequest(model="lumos-1-3b", size=(672, 384), **{"frames": 48, **options}))


# --- Lumos-1: sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "linear", "total", "token_bytes"),
    [("lumos-1-1b", 0.9731, 1.5037, 32_768), ("lumos-1-3b", 2.8186, 3.6146, 114_688)],
)
def test_parameters_and_bytes_per_token_of_lumos(name, linear, total, token_bytes):
    shape = SHAPES[name]
    assert shape.linear_parameters / 1e9 == pytest.approx(linear, abs=5e-5)
    assert shape.parameters / 1e9 == pytest.approx(total, abs=5e-5)
    assert shape.token_bytes == token_bytes


@pytest.mark.parametrize(
    ("size", "content", "tokens"), [((448, 256), 1824, 1828), ((672, 384), 4080, 4084), ((768, 480), 5820, 5824)]
)
def test_tokens_of_a_lumos_frame(size, content, tokens):
    counts = lumos() if size == (672, 384) else plan(PlanRequest(model="lumos-1-3b", size=size, frames=48))
    assert (counts["content_tokens"], counts["tokens_per_frame"]) == (content, tokens)


@pytest.mark.parametrize(
    ("frames", "latents", "tokens"), [(24, 7, 28_866), (48, 13, 53_370), (96, 25, 102_378), (192, 49, 200_394)]
)
def test_tokens_of_a_lumos_video(frames, latents, tokens):
    counts = lumos(frames=frames)
    assert (counts["latent_frames"], counts["full_tokens"]) == (latents, tokens)


def test_the_packed_prefix_of_48_frames():
    counts = lumos(policy=PackCache())
    assert [row["prefix_tokens"] for row in counts["frames"]] == [4362, 8446, 8450, 8454, *[8458] * 8]
    assert counts["prefix_tokens"] == 8458
    assert counts["history_bytes"] == 2 * 8458 * 114_688
    assert counts["full_history_bytes"] == 2 * 53_370 * 114_688
    gib = [counts[key] / 2**30 / 2 for key in ("full_history_bytes", "history_bytes", "frame_bytes")]
    assert gib == pytest.approx([5.70, 0.90, 0.44], abs=6e-3)


# --- Lumos-1: the cost model ------------------------------------------------------------------------------------------


def test_flops_of_one_forward():
    linear, attention = LUMOS.forward_flops(53_370)
    shape = LUMOS.shape
    assert 2 * shape.linear_parameters * 4084 == pytest.approx(2.30e13, rel=3e-3)
    assert 2 * shape.hidden * shape.vocabulary * 4084 == pytest.approx(3.25e12, rel=1e-3)
    assert linear == pytest.approx(2.63e13, rel=2e-3)
    assert attention == pytest.approx(1.405e9 * 53_370, rel=1e-3)
    assert attention / linear == pytest.approx(2.85, abs=5e-3)
    assert LUMOS.forward_flops(28_866)[1] / linear == pytest.approx(1.54, abs=5e-3)


TABLE = """
    24  1.22/1.52 1.25/1.58 1.27/1.64 1.38/1.87 1.47/2.07
    48  1.61/2.31 1.67/2.45 1.74/2.60 2.02/3.18 2.26/3.69
    96  2.39/3.88 2.54/4.20 2.69/4.51 3.32/5.79 3.86/6.91
    192 3.95/7.02 4.28/7.68 4.60/8.34 5.92/11.0 7.08/13.4
"""
ROWS = [
    (int(row.split()[0]), e, tuple(map(float, cell.split("/"))))
    for row in TABLE.strip().splitlines()
    for e, cell in zip((1.0, 1.2, 1.43, 3.0, 7.0), row.split()[1:], strict=True)
]


@pytest.mark.parametrize(("frames", "e", "expected"), ROWS, ids=lambda x: str(x))
def test_predicted_speedups_end_to_end_and_of_the_last_frame(frames, e, expected):
    found = LUMOS.budget_speedup(SHAPES["lumos-1-3b"].latent_frames(frames), 1.0, e)
    assert found == pytest.approx(expected, abs=0.051 if max(expected) >= 10 else 0.011)


@pytest.mark.parametrize(
    ("budget", "a40", "h200"),
    [(0, (0.95, 1.80), (2.28, 2.35)), (0.5, (1.15, 1.77), (3.47, 2.31)), (1, (1.44, 1.74), (7.2, 2.27)),
     (1.5, (1.93, 1.72), None), (2, (2.94, 1.70), None), (3, None, None)],
)  # fmt: skip
def test_the_published_last_frame_ratios_leave_room_for_one_frame_of_history(budget, a40, h200):
    for last, expected in ((2.6, a40), (3.7, h200)):
        e = LUMOS.inefficiency(13, budget, last)
        assert (e is None) == (expected is None)
        if e is not None:
            assert e == pytest.approx(expected[0], rel=0.01)
            assert LUMOS.budget_speedup(13, budget, e) == pytest.approx((expected[1], last), abs=0.006)


def test_full_history_grows_linearly_and_packcache_is_flat():
    ratios = [
        LUMOS.frame_flops(LUMOS.full_keys(k), 1.43) / LUMOS.frame_flops(LUMOS.budget_keys(k, 1), 1.43)
        for k in range(1, 13)
    ]
    expected = [1.00, 1.00, 1.16, 1.32, 1.48, 1.64, 1.80, 1.96, 2.12, 2.28, 2.44, 2.60]
    assert ratios == pytest.approx(expected, abs=0.006)


def test_the_authors_mask_is_what_fills_a_48_gb_card():
    assert LUMOS.mask_bytes(53_370) / 1e9 == pytest.approx(48, abs=0.5)
    assert LUMOS.mask_bytes(28_866) / 1e9 == pytest.approx(14, abs=0.2)
    assert LUMOS.mask_bytes(53_370, 4) / 1e9 == pytest.approx(11.4, abs=0.05)


def test_the_counted_plan_agrees_with_the_closed_form():
    counted = lumos(policy=PackCache())
    for e, pair in counted["speedups"].items():
        assert pair == pytest.approx(LUMOS.budget_speedup(13, 1.0, float(e)), rel=2e-3)  # structural tokens
    assert counted["full_flops"] / counted["flops"] == pytest.approx(counted["speedups"]["1"][0], abs=1e-3)
    assert counted["flops"] == sum(row["flops"] for row in counted["frames"])


def test_without_a_policy_the_plan_is_full_history():
    counts = lumos()
    assert counts["policy"] == "full" and counts["flops"] == counts["full_flops"]
    assert counts["prefix_tokens"] == counts["full_tokens"] - counts["tokens_per_frame"]


def test_steps_and_length_scale_the_cost():
    assert lumos(steps=25)["flops"] * 51 == pytest.approx(lumos()["flops"] * 26)
    assert lumos(frames=None, seconds=4.0) == lumos()
    assert lumos(frames=None, chunks=12) == lumos()


# --- any policy on metadata -------------------------------------------------------------------------------------------


def test_a_measured_decay_is_planned_with():
    measured = replace(SHAPES["lumos-1-1b"], decay=0.8)
    request = PlanRequest(model="", shape=measured, frames=17, policy=PackCache(rho="auto"))
    assert plan(request) == plan(replace(request, policy=PackCache(rho=0.8)))


def test_a_walk_counts_what_a_window_shows():
    layout = Layout(tokens_per_frame=10, grid=(2, 5), text=3)
    steps = list(walk(SlidingWindow(6, 1), layout, [2] * 5))
    assert [s.seen for s in steps] == [3, 23, 43, 43, 43]
    assert [s.held for s in steps] == [3, 23, 43, 43, 43]


def test_a_walk_of_full_history_and_of_last_frames():
    layout = Layout(10, (2, 4), structural=(0, 9))
    assert [s.seen for s in walk(FullHistory(), layout, [1] * 4, given=1)] == [10, 20, 30, 40]
    assert [s.seen for s in walk(LastFrames(1), layout, [1] * 4, given=1)] == [10, 20, 20, 20]


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_the_promised_numbers():
    asked = "--model lumos-1-3b --size 672x384 --frames 48 --policy packcache --json"
    counts = json.loads(run(*asked.split()).stdout)
    assert (counts["tokens_per_frame"], counts["latent_frames"]) == (4084, 13)
    promised = ("full_tokens", "prefix_tokens", "history_bytes", "full_history_bytes", "flops", "full_flops")
    assert all(counts[key] > 0 for key in promised)


def test_without_json_every_number_has_a_line():
    out = run("--model", "lumos-1-1b", "--frames", "24").stdout
    assert "tokens per frame: 4,084" in out and "GB)" in out and "\n  1: 1 / 1\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model lumos --frames 48", "no model 'lumos' to plan for; known: "),
        ("--model lumos-1-3b", "no length: say how long the video is"),
        ("--model lumos-1-3b --frames 48 --seconds 2", "--frames and --seconds: say how long"),
        ("--model lumos-1-3b --frames 0", "--frames 0: give at least 1"),
        ("--model lumos-1-3b --frames 1", "ask for at least 2"),
        ("--model lumos-1-3b --seconds -2", "-2 seconds: ask for a finite length above 0"),
        ("--model lumos-1-3b --frames 48 --size 670x384", "size 670x384: lumos-1-3b needs multiples of 32 pixels, e.g"),
        ("--model lumos-1-3b --frames 48 --size big", "write WIDTHxHEIGHT"),
        ("--model lumos-1-3b --frames 48 --chunk 3", "one latent frame at a time"),
        ("--model lumos-1-3b --frames 48 --policy nope", "no policy 'nope'; known: "),
        ("--model lumos-1-3b --frames 48 --policy packcache:rho=auto", "rho=auto needs the model's measured decay"),
        ("--model lumos-1-3b --frames 48 --size 6368x384", "words for sides of up to 6336 pixels"),
    ],
)
def test_a_wrong_question_gets_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments.split())
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def test_an_unknown_request_is_refused_in_python_too():
    with pytest.raises(LongtakeError, match=r"known: .*lumos-1-1b"):
        plan(PlanRequest(model="nope", frames=3))
    assert {"lumos-1-1b", "lumos-1-3b"} <= models().keys()
