"""`longtake bench flowcache` measures what it says it measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from longtake import LongtakeError, Session
from longtake.evaluate import bench_flowcache
from longtake.evaluate.bench_flowcache import SHAPES
from longtake.evaluate.flowcache_arms import SKIPPED, Arm, arms, calibrated, skipped
from longtake.evaluate.flowcache_quality import quality
from longtake.evaluate.flowcache_report import PIPELINE, FlowCacheReport, QualityRow
from longtake.hosts.base import HostConfig
from longtake.hosts.skyreels import SkyReels
from longtake.reuse import FlowCacheReuse
from longtake.samplers.stagger import Stagger
from longtake.zoo import tiny_text, tiny_transformer, train_tiny_skyreels

MICRO = SHAPES["cpu-micro"]


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
            found = skipped(arm.reuse, host, host.geometry(), host.config.training_frames, arm.sampler(host))
            assert abs(found - SKIPPED["fast" if "fast" in arm.name else "slow"]) <= 0.02, arm.name


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
    assert calibrated(lambda at: min(0.5, at), 0.9) <= 0.6  # cannot be reached: the least that comes as near as any
    assert calibrated(lambda at: float(at >= 0.1), 0.2) < 0.1  # between nothing and everything, nothing is nearer


def test_the_benchmark_counts_times_and_reports(tmp_path: Path) -> None:
    report = bench_flowcache.run("cpu-micro", model=None, rounds=1, seeds=0, force=True)
    rows = {row.arm: row for row in report.speed}
    assert {PIPELINE, "none", "flowcache slow", "teacache as fast", "flowcache slow, compressed"} <= set(rows)
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
    assert rows["some"].skipped == 0.5 and rows["some"].psnr[0] < 80
    assert rows["none"].events == rows["some"].events
    assert all(rate.gap == 0 for rate in rows["all"].read.values())


def test_a_judgement_is_taken_over_of_the_same_weights_and_thresholds_only() -> None:
    def report(weights: str, threshold: float, *rows: QualityRow) -> FlowCacheReport:
        return FlowCacheReport(
            command="earlier", forced=True, shape={}, settings={"weights": weights, "seeds": len(rows)}, provenance={},
            others_busy={"before": None, "during": None}, counts={"thresholds": {"slow": threshold}}, quality=[*rows],
        )  # fmt: skip

    judged, now = report("a", 0.1, QualityRow("none", "none", 0.0)), report("a", 0.1)
    bench_flowcache._take_over(now, judged)
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
