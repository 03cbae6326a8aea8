"""The planner's arithmetic of causal Wan against the numbers PackForcing's paper gives, and against sessions."""

import json

import pytest
from typer.testing import CliRunner

from longtake import DeepForcing, DummyForcing, FullHistory, LongtakeError, PackForcing, Session, SlidingWindow
from longtake.cli import app
from longtake.geometry import Geometry
from longtake.planner import PlanRequest, plan
from longtake.planner.wan import SHAPES

from .tiny import text, tiny_wan


def wan(**options) -> dict:
    return plan(PlanRequest(**{"model": "wan-1.3b", "size": (832, 480), "seconds": 120, "chunk": 4} | options))


def on_the_command_line(*options: str) -> dict:
    base = ["plan", "--model", "wan-1.3b", "--size", "832x480", "--seconds", "120", "--policy", "packforcing", "--json"]
    result = CliRunner().invoke(app, [*base, *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_papers_figures_come_out_of_the_command_line():
    """27,872 attended tokens, 3.99 GB stored, 138 GB without; and the archive, which the paper leaves out."""
    counts = on_the_command_line("--chunk", "4")
    assert counts["attended_tokens"] == 2 * 6240 + 16 * 182 + 6240 + 6240 == 27_872
    assert counts["history_bytes"] == 21_632 * 184_320 and round(counts["history_bytes"] / 1e9, 2) == 3.99
    assert counts["full_history_bytes"] == 748_800 * 184_320 and round(counts["full_history_bytes"] / 1e9) == 138
    assert counts["archive_blocks"] == 117 and counts["archive_bytes"] == 117 * 182 * 184_320
    assert round(counts["archive_bytes"] / 1e9, 2) == 3.92


def test_chunks_of_three_frames():
    counts = on_the_command_line("--chunk", "3")
    assert counts["compressed_tokens"] == 91
    assert counts["attended_tokens"] == 9360 + 16 * 91 + 4680 + 4680 == 20_176
    assert counts["archive_bytes"] == 128 * 91 * 184_320  # the cap


def test_a_forward_costs_what_the_tables_say():
    """48.3 TFLOP, two thirds of it self-attention; 40.4 and 28.3 for the windows of Self-Forcing and LongLive."""
    counts = wan(policy=PackForcing())
    assert counts["forward_flops"]["total"] / 1e12 == pytest.approx(48.3, abs=0.1)
    assert counts["attention_share"] == pytest.approx(0.66, abs=0.01)
    for window, flops in ((SlidingWindow(21, 3), 40.4), (SlidingWindow(12, 3), 28.3)):
        total = wan(chunk=3, policy=window)["forward_flops"]["total"] / 1e12
        assert total == pytest.approx(flops, abs=0.1)
    assert wan(policy=FullHistory())["forward_flops"]["total"] / 1e12 == pytest.approx(877 + 7, abs=3)


def test_five_and_a_half_gigabytes_hold_it_with_the_archive_capped_or_elsewhere():
    for policy in (PackForcing(archive=16), PackForcing(layers="shared", offload=True)):
        counts = wan(policy=policy)
        allocated = counts["allocated_bytes"]
        assert allocated["history"] + allocated["fetched"] + allocated["scratch_view"] <= 5.5e9
    assert counts["host_bytes"] == 117 * 182 * 184_320


def test_a_cap_in_bytes_is_kept():
    counts = wan(policy=PackForcing(archive_bytes=1_000_000_000))
    assert counts["archive_blocks"] == 29 and counts["archive_bytes"] <= 1_000_000_000


@pytest.mark.parametrize(
    "policy",
    [FullHistory(), SlidingWindow(9, 3), PackForcing(sink=1, top_k=2, archive=3), PackForcing(sink=1, middle="full")],
    ids=repr,
)
def test_the_walk_counts_what_a_session_attends_to(policy):
    host = tiny_wan(grid=(4, 4), timesteps=(1000,))
    take = Session(host, policy, prompt_embeds=text(), decode=False)
    tokens = [next(take).stats.attended_tokens for _ in range(8)]
    counts = plan(PlanRequest(model="wan-1.3b", size=(64, 64), chunks=8, chunk=3, policy=policy))
    assert counts["attended"] == tokens
    assert (
        SHAPES["wan-1.3b"].history(Geometry(64, 64, 16, 3, 16), None).compressed_tokens
        == take.history.shape.compressed_tokens
    )


@pytest.mark.parametrize("policy", [DeepForcing(), DummyForcing()], ids=lambda p: p.name)
def test_policies_that_ask_the_model_are_counted_by_what_they_promise(policy):
    counts = wan(chunk=3, policy=policy)
    sizes = SHAPES["wan-1.3b"].history(Geometry(480, 832, 16, 3, 16), 483)
    assert counts["attended_tokens"] == policy.visible(sizes)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(LongtakeError, match="multiples of 16"):
        wan(size=(830, 480))
