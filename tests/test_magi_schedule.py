"""MAGI-1's times, chunks in flight, KV ranges and held tokens are the published ones, row by row."""

from __future__ import annotations

import json

import pytest

from longtake import LongtakeError
from longtake.hosts.magi.schedule import MagiSettings, times
from longtake.plan import FULL, Block, BlockTable, Form, Fuse, HistoryShape, Signals
from longtake.policies import FlowCacheKV, KVRange
from longtake.samplers.step_matrix import StepMatrix

from .tiny import GOLDENS

STORED = json.loads((GOLDENS / "magi_schedule.json").read_text())
SIMS = json.loads((GOLDENS / "magi_kv_tracker.json").read_text())["sims"]


def settings(num_steps: int = 16, window_size: int = 4, **options: object) -> MagiSettings:
    options.setdefault("noise2clean_kvrange", ())
    return MagiSettings(num_steps=num_steps, window_size=window_size, **options)


@pytest.mark.parametrize("table", STORED["timesteps"], ids=lambda table: table["num_steps"])
def test_times_and_intervals_are_the_published_tables(table: dict) -> None:
    one = settings(table["num_steps"])
    assert one.times() == pytest.approx(table["t"], abs=2e-7)
    assert one.intervals() == tuple(table["interval"])


@pytest.mark.parametrize("table", STORED["timesteps_other_shift"], ids=lambda table: table["shift"])
def test_other_shifts_are_the_published_ones(table: dict) -> None:
    assert times(table["num_steps"], table["shift"]).tolist() == pytest.approx(table["t"], abs=2e-7)


def test_the_distilled_model_is_told_its_step_size() -> None:
    sizes = lambda n: [settings(n, cfg_number=1, distill=True).step_size(k) for k in range(n)]
    assert set(sizes(64)) == {32} and set(sizes(8)) == {4}
    assert sizes(12) == [4.0, 8.0, 8.0] * 4  # longer steps count as coarser ones
    assert settings(16).step_size(0) is None


def test_sixteen_of_64_steps_are_nearly_clean() -> None:
    """The first of them is 0.3 plus a rounding, which counts."""
    one = settings(64, cfg_number=1, distill=True)
    assert [one.nearly_clean_at(t) for t in one.times()[:-1]] == [False] * 48 + [True] * 16
    assert not any(settings(64).nearly_clean_at(t) for t in one.times())


def test_guidance_by_time_is_the_published_one() -> None:
    one = MagiSettings()
    scales = [one.guidance(t) for t in (0.0, 0.0216, 0.0218, 0.1, 0.2999, 0.3, 0.5, 0.9999)]
    assert scales == [(1.5, 7.5)] * 5 + [(1.0, 0.0)] * 3
    assert one.guidance(one.times()[24]) == (1.0, 0.0)  # 0.3 as computed


@pytest.mark.parametrize("case", STORED["activity"], ids=lambda case: f"{case['chunks']}x{case['num_steps']}")
def test_every_row_has_the_published_chunks_steps_times_and_ranges(case: dict) -> None:
    one = settings(
        case["num_steps"], case["window"], noise2clean_kvrange=tuple(case["noise2clean_kvrange"]),
        clean_chunk_kvrange=case["clean_chunk_kvrange"],
    )  # fmt: skip
    given, levels = case["prefix_chunks"], one.times()
    matrix = StepMatrix(one.num_steps, one.stage_steps)
    made = case["chunks"] - given
    assert one.stage_steps == case["steps_per_stage"]
    assert matrix.rows(made) == case["total_forward_steps"]
    for row in case["rows"]:
        steps = {given + c: matrix.step(row["step"], c) for c in range(made)}
        active = [c for c, step in steps.items() if step is not None]
        assert active == list(range(row["chunk_start"], row["chunk_end"]))
        # a chunk that took its last step in the row before is read once more
        before = [given + c for c in range(made) if matrix.start(c) + matrix.steps == row["step"]]
        assert row["clean_pass"] == bool(before)
        run = [*before, *active]
        clean = case["num_steps"]
        assert [clean if c in before else steps[c] for c in run] == row["denoise_step_of_each_chunk"]
        ours = [one.clean_t if c in before else levels[steps[c]] for c in run]
        assert ours == pytest.approx(row["t"], abs=2e-7)
        reach = [one.clean_range() if c in before else one.kv_range(steps[c]) for c in run]
        first = [0 if n is None else max(0, c + 1 - n) for c, n in zip(run, reach, strict=True)]
        assert [[a, c + 1] for a, c in zip(first, run, strict=True)] == row["kv_ranges"]


@pytest.mark.parametrize("case", STORED["prefix_kv_ranges"], ids=lambda case: case["prefix_chunks"])
def test_given_chunks_see_the_published_ranges(case: dict) -> None:
    ranges, clean = case["noise2clean_kvrange"], case["clean_chunk_kvrange"]
    one = settings(noise2clean_kvrange=tuple(ranges), clean_chunk_kvrange=clean)
    n = one.clean_range(given=True)
    assert [[max(0, c + 1 - n), c + 1] for c in range(case["prefix_chunks"])] == case["kv_ranges"]


def test_ranges_follow_progress_and_forget_what_nobody_sees() -> None:
    policy = KVRange("5/4/3/2")
    assert [policy.reach(k, 16) for k in (0, 3, 4, 8, 12, 15, 16)] == [5, 5, 4, 3, 2, 2, 1]
    past = tuple(Block(i, "committed", 6 * i, 6, {FULL: Form(24)}) for i in range(4))
    live = tuple(Block(i, "live", 6 * i, 6, {FULL: Form(24)}) for i in range(4, 8))
    plan = policy.plan(BlockTable(past, live, 24), Signals())
    assert [e.block for e in plan.entries] == [3] and [d.block for d in plan.drops] == [0, 1, 2]
    for wrong in ("", "5/0", "a", "5,4"):
        with pytest.raises(LongtakeError, match="5/4/3/2"):
            KVRange(wrong)


@pytest.mark.parametrize("sim", SIMS, ids=lambda sim: f"B{sim['B_total']}")
def test_tokens_held_and_seen_are_the_published_ones(sim: dict) -> None:
    """The published tracker of held tokens against the plan: when chunks are compressed, from and to how many tokens,
    and what each chunk sees at the start of a stage."""
    n, window, steps = sim["tokens_per_chunk"], sim["window"], sim["num_steps"]
    shape = HistoryShape(1, 1, 8, 4, n // 6, 6, frames=6 * sim["chunks"], live_chunks=window)
    policy = FlowCacheKV(sim["B_total"], sort=False).settle(shape)
    assert policy.capacity(shape) == min(sim["capacity_tokens"], n * sim["chunks"])
    matrix = StepMatrix(steps, sim["steps_per_stage"])
    past, live, triggers, seen = [], [], [], []
    scored: dict = {}
    ids = iter(range(1000, 2000))
    for row in range(matrix.rows(sim["chunks"])):
        finished = [b for b in live if matrix.step(row, b.id) is None]
        for block in finished:
            live.remove(block)
            past.append(Block(block.id, "committed", block.frame, 6, block.forms))
        if row % sim["steps_per_stage"] == 0 and row // sim["steps_per_stage"] < sim["chunks"]:
            c = row // sim["steps_per_stage"]
            live.append(Block(c, "live", 6 * c, 6, {FULL: Form(n)}))
        table = BlockTable(tuple(past), tuple(live), sum(b.span for b in past))
        count = sum(b.forms[FULL].count for b in (*past, *live))
        plan = policy.plan(table, Signals(min(row // sim["steps_per_stage"] + 1, sim["chunks"]), scored))
        if plan.entries and isinstance(plan.entries[0], Fuse):
            (fuse,) = plan.entries
            triggers.append((row - 1, count - n, fuse.n + n * (len(live) - 1), fuse.n))
            past = [Block(next(ids), "fused", 0, sum(b.span for b in past), {FULL: Form(fuse.n)})]
        held = sum(b.forms[FULL].count for b in past)
        if row % sim["steps_per_stage"] == 0:
            seen += [{"step": row, "chunk": b.id, "kv_tokens": held + n * (i + 1)} for i, b in enumerate(live)]
        scored = _scores(plan.observe, past, live)
    want = [(t["step"], t["tokens_before"], t["tokens_after"], t["clean_tokens_after"]) for t in sim["triggers"]]
    assert triggers == want
    assert seen == sim["kv_tokens_seen_at_stage_start"]


def _scores(observe: tuple[int, ...] | None, past: list[Block], live: list[Block]) -> dict:
    """Some score of the tokens that a plan wants looked at."""
    import torch

    n = sum(b.forms[FULL].count for b in (*past, *live) if observe is not None and b.id in observe)
    return {"cond": {0: torch.rand(1, 1, n)} if n else {}}
