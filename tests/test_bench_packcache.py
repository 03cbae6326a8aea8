"""`longtake bench packcache`: the baselines make the same video, and the answer is complete."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from longtake import FullHistory, LastFrames, LongtakeError, PackCache, Session
from longtake.cli import app
from longtake.evaluate import bench_suite, provenance
from longtake.evaluate.authors_like import AuthorsLike
from longtake.evaluate.bench_packcache import GUIDANCE, _measure, run
from longtake.evaluate.bench_stage import silent
from longtake.evaluate.lumos_shapes import SHAPES
from longtake.evaluate.machine import Clock
from longtake.samplers.masked import MaskedSampler

pytestmark = pytest.mark.usefixtures("quick", "idle")

MICRO = SHAPES["lumos-micro"]


@pytest.fixture(scope="module")
def host():
    made = MICRO.host(torch.device("cpu"), torch.float32, 3, seed=1)
    with torch.no_grad():
        torch.manual_seed(0)
        for p in made.model.parameters():  # far from the tiny initial weights, whose codes hardly depend on the past
            p.add_(0.2 * torch.randn_like(p))
    return made


def codes(host, policy, residency: str, frames: int = 4) -> torch.Tensor:
    image = torch.zeros(3, host.config.height, host.config.width)
    take = Session(
        host, policy, prompt_embeds=MICRO.prompt(host, 5), image=image, seed=5, guidance_scale=GUIDANCE,
        chunks=frames + 1, residency=residency, decode=False,
    )  # fmt: skip
    return torch.stack([next(take).latents for _ in range(frames)])


def test_both_baselines_make_the_same_tokens(host):
    sampler = MaskedSampler(steps=3)
    image = host.encode_image(torch.zeros(1, 3, host.config.height, host.config.width))
    take = AuthorsLike(
        host, MICRO.prompt(host, 5), image, sampler.noise([torch.Generator().manual_seed(5)]), GUIDANCE, sampler
    )
    authors = torch.stack([take.next_frame()[0] for _ in range(4)])
    free = codes(host, FullHistory(), "alias")
    assert torch.equal(authors, free) and torch.equal(free, codes(host, FullHistory(), "resident"))
    assert not torch.equal(free, codes(host, LastFrames(1), "resident"))  # the codes do depend on the past


def test_the_concatenated_cache_grows_by_a_frame_and_is_cropped_after_every_step(host):
    sampler = MaskedSampler(steps=3)
    image = host.encode_image(torch.zeros(1, 3, host.config.height, host.config.width))
    take = AuthorsLike(
        host, MICRO.prompt(host, 5), image, sampler.noise([torch.Generator().manual_seed(5)]), GUIDANCE, sampler
    )
    n, lengths = host.geometry().tokens_per_frame, []
    for _ in range(3):
        lengths.append(take.tokens)
        take.next_frame()
    assert lengths == [MICRO.shape.text_tokens + n * (i + 1) for i in range(3)]


@pytest.mark.parametrize("name", ["lumos-cpu", "lumos-1-3b"])
def test_attention_to_linear_flops_at_latent_13_are_those_of_the_3b_model(name):
    assert SHAPES[name].attention_to_linear() == pytest.approx(2.85, rel=0.05)


def test_the_measured_host_has_the_sizes_of_its_shape(host):
    counted = MICRO.shape
    assert sum(p.numel() for p in host.model.parameters()) == counted.parameters
    assert host.geometry().tokens_per_frame == MICRO.cost.frame_tokens
    assert MICRO.prompt(host, 0).shape == (1, counted.text_tokens)


def test_a_frame_counts_with_its_median_forward():
    now, forwards = 0.0, []

    class StoppedClock(Clock):
        def now(self) -> float:
            return now

    def take():
        nonlocal now
        for seconds in ((2.0, 2.0, 2.0), (2.0, 11.0, 2.0)):
            yield 1, 1
            for each in seconds:
                forwards.append(each)
                now += each
            now += 0.5  # between forwards
        yield 1, 1

    clock = StoppedClock(torch.device("cpu"))
    arm = _measure({"take": take}, 2, clock, forwards, in_turn=True, progress=silent)["take"]
    assert arm.seconds == [6.5, 6.5] and arm.clock_seconds == [6.5, 15.5]


def test_a_run_answers_every_length_with_predictions_and_bytes():
    report = run("lumos-micro", frames=(5, 13, 33), seed=2)
    assert list(report.arms) == ["packcache", "mask-free", "authors-like"]
    assert all(len(arm.seconds) == 8 and min(arm.seconds) > 0 for arm in report.arms.values())
    assert all(len(arm.clock_seconds) == 8 and min(arm.clock_seconds) > 0 for arm in report.arms.values())
    assert [(r.pixel_frames, r.latent_frames, r.baseline) for r in report.ratios] == [
        (p, f, b) for p, f in ((5, 2), (13, 4), (33, 9)) for b in ("mask-free", "authors-like")
    ]
    row = report.ratios[-2]
    seconds = {name: arm.seconds for name, arm in report.arms.items()}
    assert row.end_to_end == sum(seconds["mask-free"]) / sum(seconds["packcache"])
    assert row.last_frame == seconds["mask-free"][-1] / seconds["packcache"][-1]
    assert row.counted == MICRO.cost.budget_speedup(9, 1.0)
    if (e := report.calibration["e"]) is not None:  # a busy machine may make two forwards of unlike length look alike
        assert row.predicted == MICRO.cost.budget_speedup(9, 1.0, e)
    n, content, text = MICRO.cost.frame_tokens, MICRO.cost.frame_tokens - 4, MICRO.shape.text_tokens + 3
    constant = (text + 2 * (2 * n + content + 4 * 4)) * MICRO.shape.token_bytes
    assert report.arms["packcache"].held_bytes[4:] == [constant] * 4
    growth = report.arms["authors-like"].held_bytes
    assert all(b > a for a, b in pairwise(growth))
    json.dumps(report.as_dict())


def test_targets_tell_growth_from_flatness():
    report = run("lumos-micro", frames=(33,), seed=2)
    report.arms["packcache"].seconds = [1.0] * 8
    report.arms["mask-free"].seconds = [1.0 + 0.1 * i for i in range(8)]
    report.arms["authors-like"].seconds = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0]
    report.others_busy["during"] = 0.0
    report.judge()
    met = {t.name.split(":")[0]: t.met for t in report.targets[1:] if "bytes" not in t.name}
    assert met == {"packcache": True, "mask-free": True, "authors-like": False}
    report.arms["packcache"].seconds = [1.0 + 0.1 * i for i in range(8)]
    report.judge()
    assert {t.met for t in report.targets if "last / first" in t.name} == {False}
    report.others_busy["during"] = 0.5
    report.judge()
    assert {t.met for t in report.targets[1:]} == {None}


def test_the_command_writes_json_and_picture(tmp_path):
    asked = f"bench packcache --shape lumos-micro --frames 5,9 --policy packcache:history_frames=2 --out {tmp_path}"
    result = CliRunner().invoke(app, [*asked.split(), "--baseline", "mask-free"])
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "packcache-cpu.json").read_text())
    assert data["settings"]["policy_options"]["history_frames"] == 2 and list(data["arms"]) == [
        "packcache",
        "mask-free",
    ]
    again = bench_suite.read(tmp_path / "packcache-cpu.json")
    assert again.as_dict() == data and again.markdown().count("| mask-free |") == 3  # two lengths, one arm
    assert "mask-free" in result.stdout and (tmp_path / "packcache-cpu.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "nope"}, "no shape 'nope': use one of lumos-cpu"),
        ({"frames": (1,)}, "the first one is given"),
        ({"baselines": ("free",)}, "baseline 'free': use mask-free or authors-like"),
        ({"shape": "lumos-1-3b", "device": "cuda"}, "torch sees no CUDA device"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"steps": -1}, "-1 steps"),
    ],
)
def test_wrong_requests_say_what_would_do(options, message):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(LongtakeError, match=message):
        run(**{"shape": "lumos-micro", "frames": (5,), **options})


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(provenance, "others_busy", lambda: 0.9)
    with pytest.raises(LongtakeError, match="other processes use 90%"):
        run("lumos-micro", frames=(5,), policy=PackCache())
