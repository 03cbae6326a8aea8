"""FLOPs by counting: the published totals, what our samplers execute, and skipped steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from longtake import FlowCacheKV, FlowCacheReuse, FullHistory, LongtakeError, Session, SlidingWindow
from longtake.cli import app
from longtake.flops import Flops
from longtake.planner import PlanRequest, plan
from longtake.planner.magi import SHAPES as MAGI
from longtake.planner.magi import count as count_magi
from longtake.planner.magi import nearly_clean_steps
from longtake.planner.skyreels import SHAPES as SKYREELS
from longtake.planner.skyreels import count as count_skyreels
from longtake.planner.skyreels import vanilla_flops, windows
from longtake.policies import KVRange

from .skyreels import tiny_skyreels
from .tiny import text, tiny_wan

THEORY = json.loads((Path(__file__).parent / "goldens" / "relative_l1_theory.json").read_text())
SHAPE = MAGI["magi-4.5b"]
SKY = SKYREELS["skyreels-v2-1.3b"]


def test_one_forward_of_each_model():
    magi, golden = SHAPE.flop_shape, THEORY["magi_flops"]
    one = magi.forward(12_150, 12_150, 100)
    assert one.linear == golden["linear_per_chunk_forward"] + golden["embed_and_final"]
    assert one.attention == golden["attention_per_kv_chunk"]
    assert one.cross + magi.text(100).cross == golden["cross_attention_100_text_tokens"]
    sky, golden = SKY.flop_shape, THEORY["skyreels_flops"]
    one = sky.forward(10_200, 10_200, 512)
    assert one.linear == golden["linear_per_block"] + golden["embed_and_head_per_block"]
    assert one.attention == golden["attention_per_kv_block"]
    assert one.cross == golden["cross_attention_per_block"]
    assert sky.text(512).cross == golden["text_kv_per_call"]


MAGI_CASES = [case for case in THEORY["magi_flops"]["configurations"] if "text" not in case["args"]]


@pytest.mark.parametrize("case", MAGI_CASES, ids=lambda case: case["name"])
def test_magi_totals_are_the_recorded_ones_to_the_last_flop(case):
    args = case["args"]
    policy = FullHistory()
    if "B" in args:
        policy = FlowCacheKV(args["B"])
    elif "rng" in args:
        policy = KVRange("/".join(map(str, args["rng"])))
    got = count_magi(
        SHAPE, args["N"], args["n"], 2025, policy, nearly_clean=args.get("near", False), clean=args.get("clean", False),
        skipped=args.get("reuse", ()),
    )  # fmt: skip
    assert got.forwards == case["chunk_forwards"] + case["nearly_clean_passes"] + case["clean_passes"]
    assert got.total.total == case["flops"]


@pytest.mark.parametrize("steps", THEORY["nearly_clean_steps"], ids=str)
def test_nearly_clean_steps_are_counted_in_fp32(steps):
    assert sorted(nearly_clean_steps(int(steps))) == THEORY["nearly_clean_steps"][steps]


def recorded(name: str) -> float:
    return next(c["flops"] for c in THEORY["skyreels_flops"]["configurations"] if c["name"] == name)


def test_skyreels_totals_are_the_recorded_ones():
    assert vanilla_flops(SKY, 45, 2040, 5, 50).total == recorded("async block-causal all blocks, 270 calls")
    again = 268 * SKY.flop_shape.text(512).total  # recorded: text K/V in every call; here once a stream
    made = count_skyreels(SKY, 45, 2040, FullHistory(), chunk=5, steps=50, commit="adopt")
    assert made.total.total + again == recorded("no reuse, idle blocks skipped")
    for skip in (27, 28, 32, 33):
        made = count_skyreels(
            SKY, 45, 2040, FullHistory(), chunk=5, steps=50, commit="adopt", skipped=range(5, 5 + skip)
        )
        assert made.total.total == pytest.approx(recorded(f"reuse {skip} of 50"), rel=2e-3)


def test_what_is_skipped_and_what_is_made_are_the_whole():
    whole = count_magi(SHAPE, 10, 64, 2025, KVRange())
    part = count_magi(SHAPE, 10, 64, 2025, KVRange(), skipped=range(5, 20))
    assert part.total + part.skipped == whole.total and part.forwards + part.reused == whole.forwards
    whole = count_skyreels(SKY, 45, 2040, FullHistory(), chunk=5, steps=50)
    part = count_skyreels(SKY, 45, 2040, FullHistory(), chunk=5, steps=50, skipped=[7, 9])
    assert part.total + part.skipped == whole.total and part.forwards + part.reused == whole.forwards


def test_windows_of_a_skyreels_take():
    assert [(w.given, w.spans) for w in windows(SKY, 45, 5)] == [(0, (5,) * 5), (5, (5,) * 4)]
    assert [(w.given, w.spans) for w in windows(SKY, 27, 5)] == [(0, (5,) * 5), (5, (2,))]
    assert [(w.given, w.spans) for w in windows(SKY, 12, 5)] == [(0, (5, 5, 2))]


# --- the command line -------------------------------------------------------------------------------------------------


def planned(*args: str) -> dict:
    result = CliRunner().invoke(app, ["plan", *args, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_papers_vanilla_figures_by_counting():
    magi = planned("--model", "magi-4.5b", "--chunks", "10", "--steps", "64")
    assert magi["paper_vanilla_pflops"] == pytest.approx(306, rel=5e-3) and magi["paper_vanilla_counts"]
    assert magi["pflops"] == pytest.approx(209.15, rel=5e-3) and "kv-range" in magi["pflops_counts"]
    sky = planned("--model", "skyreels-v2-1.3b", "--size", "960x544", "--frames", "177")
    assert sky["paper_vanilla_pflops"] == pytest.approx(113, rel=5e-3) and sky["paper_vanilla_counts"]
    assert sky["windows"] == 2 and sky["sampler_rows"] == 135 and sky["latent_frames"] == 45
    assert sky["pflops"] == pytest.approx(81.12, rel=5e-3)


def test_reuse_rows_state_their_skip_counts_and_the_fit_says_what_it_is():
    magi = planned("--model", "magi-4.5b", "--chunks", "10", "--steps", "64")
    rows = {row["name"]: row for row in magi["rows"]}
    for name, reported in (("vanilla", 306), ("FlowCache-slow", 161), ("FlowCache-fast", 140)):
        assert rows[name]["reported_pflops"] == reported
        assert rows[name]["pflops"] == pytest.approx(reported, rel=0.015)
        assert isinstance(rows[name]["reused_steps_per_chunk"], int)
    assert "fit" in magi["fit"]["what"] and "not a measurement" in magi["fit"]["what"]
    assert [row["pflops"] for row in magi["fit"]["rows"]] == pytest.approx([155.2, 137.8], rel=1e-3)
    sky = planned("--model", "skyreels-v2-1.3b", "--frames", "177")
    for row in sky["rows"][1:]:
        assert row["pflops"] == pytest.approx(row["reported_pflops"], rel=0.03) and row["reused_steps_per_chunk"] > 0
    other = planned("--model", "skyreels-v2-1.3b", "--frames", "97")
    assert all(row["reported_pflops"] is None for row in other["rows"])


def test_bytes_of_magi_chunks():
    magi = planned("--model", "magi-4.5b", "--chunks", "10", "--policy", "flowcache:chunks=5")
    assert magi["chunk_bytes"] == pytest.approx(1.69e9, rel=2e-3)
    assert magi["history_bytes"] == 5 * magi["chunk_bytes"]
    assert magi["full_history_bytes"] == 10 * magi["chunk_bytes"]


@pytest.mark.parametrize(
    ("model", "options"),
    [("magi-4.5b", {"chunk": 5}), ("magi-4.5b", {"steps": 10}), ("skyreels-v2-1.3b", {"size": (961, 544)})],
    ids=str,
)
def test_what_a_family_cannot_do_is_refused_in_one_line(model, options):
    with pytest.raises(LongtakeError) as error:
        plan(PlanRequest(model=model, chunks=3, **options))
    assert "\n" not in str(error.value)


def test_a_budget_below_the_chunks_in_flight_is_refused_before_anything_runs():
    with pytest.raises(LongtakeError, match="use chunks=5 or more"):
        plan(PlanRequest(model="magi-4.5b", chunks=10, policy=FlowCacheKV(4)))


# --- as executed ------------------------------------------------------------------------------------------------------


def take(host=None, **options) -> Session:
    host = host or tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    return Session(host, **{"policy": SlidingWindow(9, 3), "prompt_embeds": text(), "decode": False} | options)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_counting_a_take_is_what_the_dispatcher_sees(guidance):
    """But for the conditions (timestep embedding), which no token passes."""
    session = take(guidance_scale=guidance, negative_prompt_embeds=text(seed=2) if guidance != 1 else None)
    for _ in range(3):
        # the counter knows the parts of attention, not the CPU's fused kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
            stats = next(session).stats
        counts = {name: sum(ops.values()) for name, ops in seen.get_flop_counts().items()}
        attention = sum(n for op, n in seen.get_flop_counts()["Global"].items() if "bmm" in str(op))
        assert stats.flops.attention + stats.flops.cross == attention > 0
        conditions = sum(n for name, n in counts.items() if name.endswith("condition_embedder"))
        assert stats.flops.total == seen.get_total_flops() - conditions and conditions > 0


def test_reused_steps_are_counted_as_skipped():
    full = take()
    reuse = FlowCacheReuse(1e9, "timestep", warmup=1, last="none", rescale="identity")
    for carry in ("velocity", "residual"):
        part = take(reuse=FlowCacheReuse(1e9, "timestep", carry, warmup=1, last="none", rescale="identity"))
        whole = take()
        for _ in range(3):
            a, b = next(whole).stats, next(part).stats
            assert b.flops + b.skipped_flops == a.flops
            outside = Flops()
            if carry == "residual":  # embedding and head run in reused steps too
                outside = whole.host.flops_outside(3 * whole.geometry.tokens_per_frame, 1) * 4
                assert outside.total > 0
            assert (b.skipped_flops + outside).total / a.flops.total == pytest.approx(4 / 6)
    assert next(full).stats.skipped_flops == Flops() and reuse.carry == "velocity"


def test_flops_add_up():
    a = Flops(1, 2, 3)
    assert (a + a).as_dict() == {"linear": 2, "attention": 4, "cross": 6, "total": 12} == (a * 2).as_dict()
    assert Flops(10**15).peta == 1 and torch.tensor(a.total) == 6


@pytest.mark.parametrize("frames", [45, 27, 12])
def test_the_planner_counts_what_the_staggered_sampler_executes(frames):
    """Forwards and attention of a whole take in windows, uneven tail included, with guidance."""
    host = tiny_skyreels()
    shape = replace(SKY, layers=2, hidden=24, ffn=32, steps=host.config.steps, lag=host.config.lag)
    session = Session(
        host, FullHistory(), prompt_embeds=torch.randn(1, 7, 10), negative_prompt_embeds=torch.zeros(1, 7, 10),
        num_frames=4 * (frames - 1) + 1, decode=False,
    )  # fmt: skip
    stats = [chunk.stats for chunk in session]
    planned_ = count_skyreels(shape, frames, 4, FullHistory(), chunk=5, steps=shape.steps)
    assert sum(s.forwards for s in stats) == planned_.forwards
    assert sum(s.flops.attention for s in stats) == planned_.total.attention
