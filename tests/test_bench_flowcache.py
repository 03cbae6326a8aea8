"""`longtake bench flowcache` measures what it says it measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from longtake import LongtakeError, Session, load
from longtake.evaluate import bench_flowcache
from longtake.evaluate.bench_flowcache import SHAPES
from longtake.evaluate.flowcache_arms import GIVEN, SKIPPED, Arm, arms, calibrated, skipped
from longtake.evaluate.flowcache_compared import BOTH, KV, NEITHER, REUSE, compared
from longtake.evaluate.flowcache_quality import quality
from longtake.evaluate.flowcache_report import PIPELINE, FlowCacheReport, QualityRow
from longtake.hosts.base import HostConfig
from longtake.hosts.skyreels import SkyReels
from longtake.reuse import FlowCacheReuse, TeaCacheReuse
from longtake.samplers.stagger import Stagger
from longtake.zoo import tiny_text, tiny_transformer, train_tiny_skyreels

MICRO = SHAPES["cpu-micro"]
PAIRED = ("flowcache slow", "teacache as slow")


@pytest.fixture(scope="module")
def host() -> SkyReels:
    """50 steps on 32 x 32 pixels."""
    return replace(MICRO, steps=50, lag=10).host(torch.device("cpu"), torch.float32, 0)


@pytest.fixture(scope="module")
def ways(host: SkyReels) -> list[Arm]:
    return arms(host, host.geometry(), host.config.training_frames)


def test_every_method_skips_the_stated_share_of_the_steps(host: SkyReels, ways: list[Arm]) -> None:
    for arm in ways:
        if arm.reuse is not None and arm.reuse.carry == "velocity":
            frames, aim = host.config.training_frames, SKIPPED["fast" if "fast" in arm.name else "slow"]
            assert abs(skipped(arm.reuse, host, host.geometry(), frames, arm.sampler(host)) - aim) <= 0.02, arm.name
            after = arm.continued or arm.reuse
            rest, sampler = frames - GIVEN * host.geometry().chunk_frames, arm.sampler(host, continued=True)
            assert abs(skipped(after, host, host.geometry(), rest, sampler) - aim) <= 0.03, arm.name


def test_rows_played_without_the_model_are_those_of_a_take(host: SkyReels, ways: list[Arm]) -> None:
    frames = host.config.training_frames
    for arm in ways:
        if arm.name in ("flowcache fast", "teacache as slow", "flowcache slow, compressed"):
            take = Session(
                host, arm.policy, reuse=arm.reuse, prompt_embeds=torch.ones(1, 4, 8), decode=False,
                num_frames=host.geometry().pixel_frames(frames), sampler=arm.sampler(host),
            )  # fmt: skip
            for _ in take:
                pass
            played = skipped(arm.reuse, host, host.geometry(), frames, arm.sampler(host))
            assert take.stats.reused == round(played * 5 * 50) > 0


def test_a_threshold_is_found_where_its_share_is_nearest() -> None:
    assert calibrated(lambda at: min(0.5, at), 0.3) == pytest.approx(0.3, abs=1e-6)
    assert 0.5 <= calibrated(lambda at: min(0.5, at), 0.9) <= 0.8  # cannot be reached: what comes as near as any
    assert calibrated(lambda at: float(at >= 0.1), 0.2) == pytest.approx(0.05, rel=1e-3)  # nothing is nearer than all
    steps = lambda at: 0.1 * sum(at >= edge for edge in (0.2, 0.3, 0.7, 0.8))
    assert calibrated(steps, 0.21) == pytest.approx(0.5, rel=1e-3)  # the middle of all that skip 0.2


def test_the_embedded_model_tells_a_schedule_where_all_chunks_follow_one() -> None:
    make = lambda reuse: Session(load("tiny-skyreels"), prompt="a ball", num_frames=81, reuse=reuse, decode=False)
    told = make(FlowCacheReuse("slow")).reuse_schedule()
    assert told is not None and (sum(d.reused for d in told), len(told)) == (27, 50)
    assert make(TeaCacheReuse("slow")).reuse_schedule() is None


def test_presets_of_the_embedded_model_skip_what_they_state_and_lie_on_no_edge() -> None:
    model = load("tiny-skyreels")
    frames, stagger = model.config.training_frames, Stagger.of(model.config)
    share = lambda policy: skipped(policy, model, model.geometry(), frames, stagger)
    for speed, aim in (("slow", 27 / 50), ("fast", 32 / 50)):
        for kind, off in ((FlowCacheReuse, 0.0), (TeaCacheReuse, 0.5 / 50)):
            at = kind(speed).for_model(model.reuse_preset).threshold
            found = [share(kind(at * by)) for by in (0.9995, 1, 1.0005)]
            assert found == [found[1]] * 3 and abs(found[1] - aim) <= off + 1e-9, (kind, speed, found)


def test_the_benchmark_counts_times_and_reports(tmp_path: Path) -> None:
    report = bench_flowcache.run("cpu-micro", model=None, rounds=1, seeds=0, force=True)
    rows = {row.arm: row for row in report.speed}
    assert {PIPELINE, "none", "flowcache slow", "teacache as fast", "flowcache slow, compressed"} <= set(rows)
    assert [arm for arm in rows if "carry" in arm] == ["flowcache slow, carry residual"]  # the one that costs time
    assert rows["flowcache slow, carry residual"].shapes == rows["flowcache slow"].shapes
    judged = {t.name.split(": ")[0]: t.met for t in report.targets}
    assert {"cpu-micro, teacache as slow", "cpu-micro, teacache as fast", "cpu-micro, none"} <= set(judged)
    assert None not in judged.values()
    per_chunk = MICRO.steps + 1
    assert sum(shape.forwards for shape in rows["none"].shapes) == MICRO.chunks * per_chunk
    tokens = MICRO.chunk_frames * 4
    assert {s.queries for s in rows["none"].shapes} == {tokens}
    assert {s.keys for s in rows["none"].shapes} == {tokens * n for n in range(1, MICRO.chunks + 1)}
    assert max(s.keys for s in rows["compressed"].shapes) <= 4 * tokens
    steps = MICRO.chunks * MICRO.steps
    slow = rows["flowcache slow"]
    assert sum(s.forwards for s in slow.shapes) == steps + MICRO.chunks - round(slow.skipped * steps) < steps
    assert all(row.seconds[0] > 0 for row in rows.values())
    names = {figure.name for figure in report.figures}
    assert {"cpu-micro: diffusers pipeline / none", "cpu-micro: none / flowcache slow"} <= names
    files = report.write(tmp_path, "flowcache-cpu")
    assert [path.name for path in files] == ["flowcache-cpu.json", "flowcache-cpu.png"]
    assert FlowCacheReport.read(files[0]).as_dict() == report.as_dict()
    assert "teacache as fast" in report.text() and "| cpu-micro |" in report.markdown()


@pytest.fixture(scope="module")
def drawn() -> SkyReels:
    """A model of the world of lanes that has learnt nothing: short takes of few steps."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    tokens = tiny_text.tokenizer()
    config = HostConfig(
        host="skyreels", causal=True, chunk_frames=3, shift=5.0, fps=16, height=128, width=128, text_tokens=24,
        training_frames=12, sampler="staggered", steps=4, lag=2, overlap=3, reuse="skyreels", world="lanes",
    )  # fmt: skip
    model = train_tiny_skyreels.build(tiny_transformer.build(4)).requires_grad_(False).eval()
    return SkyReels(model, config, vae=vae.eval(), text_encoder=tiny_text.build(len(tokens)), tokenizer=tokens)


def test_takes_are_compared_with_the_ones_of_the_same_noise(drawn: SkyReels) -> None:
    """A threshold that computes everything changes no pixel; one that reuses does, and its returns are read too."""
    way = lambda threshold: FlowCacheReuse(threshold, "timestep", warmup=1, last="chunk", rescale="identity")
    rows = {
        row.arm: row for row in quality(drawn, [Arm("none"), Arm("all", way(0.0)), Arm("some", way(9.0))], seeds=[1])
    }
    assert rows["none"].psnr == [] and rows["none"].skipped == rows["all"].skipped == 0
    assert rows["all"].psnr[0] > 100 and rows["all"].ssim == [pytest.approx(1)] == rows["all"].continued_ssim
    assert rows["some"].skipped == rows["some"].continued_skipped == 0.5 and rows["some"].psnr[0] < 80
    assert rows["none"].events == rows["some"].events == len(rows["some"].hits["lawful"][0])
    assert all(rate.gap == 0 for rate in rows["all"].read.values())


def judged_row(arm: str, psnr: list[float], lawful: list[list[float]], against: str = "none") -> QualityRow:
    like = [1 - 10 ** (-p / 20) for p in psnr]
    hits = {name: lawful for name in ("lawful", "colour", "texture")}
    return QualityRow(arm, against, 0.5, 0.5, psnr, like, psnr, like, hits)


def test_arms_are_compared_with_each_other_seed_by_seed() -> None:
    """Six seeds in which one arm is better by 1 dB and 2 of 3 returns; its neighbour is the same arm again."""
    low, high = [20.0, 22, 19, 25, 21, 23], [21.0, 23, 20, 26, 22, 24]
    rows = [
        judged_row("flowcache slow", high, [[1.0, 1, 1]] * 6), judged_row("teacache as slow", low, [[1.0, 0, 0]] * 6),
        judged_row("flowcache slow, carry update", high, [[1.0, 1, 1]] * 6),
    ]  # fmt: skip
    found = {(c.measure, c.second): c for c in compared(rows)}
    tea = found["PSNR", "teacache as slow"]
    assert tea.gap == pytest.approx(1) and tea.ci95 == pytest.approx((1, 1)) and tea.p < 0.05
    assert tea.holm == pytest.approx(2 * tea.p)  # two arms are compared
    assert found["lawful", "teacache as slow"].gap == pytest.approx(2 / 3)
    same = found["PSNR", "flowcache slow, carry update"]
    assert same.gap == 0 and same.p == 1


def test_an_interaction_is_what_both_do_beyond_what_each_does() -> None:
    """Errors add up (as decibels they do not), returns do not: each alone keeps one of two, and so do both."""
    alone, together = [20.0, 23, 26], [float(-10 * np.log10(2 * 10 ** (-p / 10))) for p in (20.0, 23, 26)]
    rows = [
        judged_row(NEITHER, [], [[1.0, 1]] * 3, NEITHER), judged_row(KV, alone, [[1.0, 0]] * 3, NEITHER),
        judged_row(REUSE, alone, [[0.0, 1]] * 3, NEITHER), judged_row(BOTH, together, [[0.0, 1]] * 3, NEITHER),
    ]  # fmt: skip
    found = {(c.measure, c.second): c for c in compared(rows)}
    assert found["error in PSNR", f"{KV} + {REUSE}"].gap == pytest.approx(0, abs=1e-9)
    assert found["lawful", f"{KV} + {REUSE}"].gap == pytest.approx(0.5)
    assert found["PSNR", KV].gap == pytest.approx(-10 * np.log10(2))


def test_a_report_with_a_judgement_reads_back_and_tells_its_comparisons(tmp_path: Path) -> None:
    rows = [judged_row(arm, [20.0 + k, 21, 23], [[1.0], [], [0.0]]) for k, arm in enumerate(PAIRED)]
    report = FlowCacheReport(
        command="c", forced=True, shape={"name": "s"}, settings={"threads": 1, "dtype": "float32"}, figures=[],
        provenance={"machine": {"gpu": None, "cpu": "x", "cores": 2}, "versions": {"torch": "2"}, "git": None,
                    "date": "2026-01-01"},
        others_busy={"before": None, "during": None}, quality=rows, compared=compared(rows),
    )  # fmt: skip
    path = report.write(tmp_path, "flowcache-cpu")[0]
    assert FlowCacheReport.read(path).as_dict() == report.as_dict()
    assert "PSNR: flowcache slow less teacache as slow: -0.333 [-1, +0], p" in report.text()
    assert "| flowcache slow less teacache as slow |" in report.markdown()


def test_a_judgement_is_taken_over_of_the_same_weights_and_thresholds_only() -> None:
    def report(weights: str, threshold: float, *rows: QualityRow) -> FlowCacheReport:
        return FlowCacheReport(
            command="earlier", forced=True, shape={}, settings={"weights": weights, "seeds": len(rows)}, provenance={},
            others_busy={"before": None, "during": None}, counts={"thresholds": {"slow": threshold}}, quality=[*rows],
        )  # fmt: skip

    judged, now = report("a", 0.1, QualityRow("none", "none", 0.0)), report("a", 0.1)
    judged.compared = compared([judged_row(arm, [20.0, 21], []) for arm in PAIRED])
    bench_flowcache._take_over(now, judged)
    assert now.compared == judged.compared != []
    assert (
        now.quality == judged.quality and now.settings["seeds"] == 1 and now.settings["judged"]["command"] == "earlier"
    )
    for other, word in ((report("b", 0.1), "weights"), (report("a", 0.2), "thresholds")):
        with pytest.raises(LongtakeError, match=f"of {word}.*judge again"):
            bench_flowcache._take_over(other, judged)
        assert other.quality == []


def test_a_model_of_another_world_is_not_judged(host: SkyReels) -> None:
    with pytest.raises(LongtakeError, match="lanes"):
        quality(host, [Arm("none")], [0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape": "gpu"}, "cpu-sky"),
        ({"rounds": 0, "seeds": 0}, "leaves a part out"),
        ({"model": None, "seeds": 1}, "--seeds 0"),
        ({"model": "tiny-wan"}, "tiny-skyreels"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options: dict, said: str) -> None:
    with pytest.raises(LongtakeError, match=said) as caught:
        bench_flowcache.run(**{"shape": "cpu-micro", "force": True, **options})
    assert "\n" not in str(caught.value)


def test_staggered_settings_of_an_arm_are_the_models_but_for_its_lag(host: SkyReels) -> None:
    assert Arm("a").sampler(host) == Stagger.of(host.config)
    assert Arm("a", lag=3).sampler(host) == replace(Stagger.of(host.config), lag=3)
