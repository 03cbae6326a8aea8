"""`longtake bench packcache`: the baselines make the same video, and the answer is complete."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longtake import FullHistory, LastFrames, LongtakeError, PackCache, Session
from longtake.cli import app
from longtake.evaluate import bench_packcache, bench_suite, provenance
from longtake.evaluate.authors_like import AuthorsLike
from longtake.evaluate.bench_packcache import (
    GUIDANCE,
    AuthorsTake,
    Forwards,
    SessionTake,
    _forwards,
    _measure,
    run,
)
from longtake.evaluate.bench_stage import silent
from longtake.evaluate.lumos_shapes import SHAPES
from longtake.evaluate.machine import Clock
from longtake.evaluate.packcache_prediction import Calibration, _drawing, drawn_rows
from longtake.evaluate.packcache_ratios import RESAMPLES, ratios, resampled
from longtake.evaluate.packcache_report import ArmRun
from longtake.evaluate.peak import PeakBytes
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


class StoppedClock(Clock):
    """Shows what it is told."""

    at = 0.0

    def now(self) -> float:
        return self.at


class Told:
    """An arm's take whose forwards take the given seconds, and half a second passes between them in every frame."""

    def __init__(self, clock: StoppedClock, forwards: Forwards, frames: list[tuple[float, ...]], breaks: int = 99):
        self.clock, self.noted, self.told, self.breaks = clock, forwards, frames, breaks

    def allocated(self, latent_frames: int) -> int:
        return 1000 * latent_frames

    def frames(self, latent_frames: int):
        for number, seconds in enumerate(self.told[: latent_frames - 1]):
            yield number, number
            if number == self.breaks and latent_frames > 2:
                raise torch.OutOfMemoryError("no memory left\nsecond line")
            for each in seconds:
                self.noted.begins()
                self.noted.seconds.append(each)
                self.clock.at += each
            self.clock.at += 0.5
        yield latent_frames - 1, latent_frames - 1


@pytest.fixture
def told():
    clock, forwards = StoppedClock(torch.device("cpu")), Forwards()
    return clock, forwards, lambda frames, breaks=99: Told(clock, forwards, frames, breaks)


def test_a_frame_counts_with_its_median_forward(told):
    clock, forwards, take = told
    takes = {"take": take([(2.0,) * 6, (2.0, 11.0, 2.0, 2.0, 2.0, 2.0), (9.0, 9.0, 9.0, 9.0, 3.0, 3.0)])}
    arms, missing = _measure(takes, [4], clock, forwards, in_turn=True, progress=silent)
    assert arms["take"].clock_seconds == [12.5, 21.5, 42.5] and not missing
    # memory is watched during the first four forwards of the last frame: they are not counted
    assert arms["take"].seconds == [12.5, 12.5, 18.5]
    assert arms["take"].forwards[-1] == [3.0, 3.0] and arms["take"].forward_counts[-1] == 6


def test_an_arm_without_memory_is_a_missing_row_and_the_others_go_on(told):
    clock, forwards, take = told
    takes = {"own": take([(1.0,) * 4] * 5), "wide": take([(2.0,) * 4] * 5, breaks=3)}
    for in_turn in (True, False):
        arms, missing = _measure(takes, [3, 6], clock, forwards, in_turn=in_turn, progress=silent)
        assert len(arms["own"].seconds) == 5 and len(arms["wide"].seconds) == 3
        assert [(row.what, row.reason) for row in missing] == [("wide from latent frame 5 on", "no memory left")]
        found, unreached = ratios(arms, "own", [(9, 3), (21, 6)], MICRO.cost, Calibration(MICRO, 2, 6), 1.0)
        assert [(r.pixel_frames, r.end_to_end, r.predicted) for r in found] == [(9, 8.5 / 4.5, None)]
        assert [(row.what, row.reason) for row in unreached] == [
            ("ratio to wide at 21 pixel frames", "wide made 3 of 5 latent frames")
        ]


def test_an_arm_is_gone_from_memory_before_the_next_begins_where_they_do_not_take_turns(told):
    clock, forwards, take = told
    alive: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    class Noted:
        def __init__(self, name: str, inner: Told) -> None:
            self.name, self.inner = name, inner

        def allocated(self, latent_frames: int) -> int:
            return 0

        def frames(self, latent_frames: int):
            seen.append((self.name, alive.copy()))
            alive.append(self.name)
            try:
                yield from self.inner.frames(latent_frames)
            finally:
                alive.remove(self.name)

    takes = {
        "first": Noted("first", take([(1.0,) * 4] * 3)),
        "broken": Noted("broken", take([(1.0,) * 4] * 3, breaks=0)),
        "last": Noted("last", take([(1.0,) * 4] * 3)),
    }
    arms, missing = _measure(takes, [4], clock, forwards, in_turn=False, progress=silent)
    assert all(others == [] for _, others in seen) and [name for name, _ in seen] == [
        "first", "first", "broken", "broken", "last", "last",
    ]  # fmt: skip
    assert [row.what for row in missing] == ["broken from latent frame 2 on"] and not arms["broken"].seconds


def test_predictions_are_made_between_frames_until_they_fail(told):
    clock, forwards, take = told
    calls = []

    def between() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise RuntimeError("no memory left")

    _, missing = _measure(
        {"take": take([(1.0,) * 4] * 20)}, [21], clock, forwards, in_turn=True, progress=silent, between=between
    )
    assert calls == [0, 1] and [row.what for row in missing] == ["predictions"]


def test_the_interval_is_of_forwards_drawn_again():
    still, lively = ArmRun(), ArmRun()
    for _ in range(3):
        still.add(9.0, [2.0, 2.0, 2.0, 2.0])
        lively.add(13.0, [2.0, 4.0, 2.0, 4.0])
    assert np.array_equal(resampled(still), np.full((RESAMPLES, 3), 9.0))
    found = resampled(lively)
    assert set(np.unique(found)) == {9.0, 13.0, 17.0}  # medians 2, 3 and 4 of four forwards, a second between them
    (row,), _ = ratios({"own": still, "full": lively}, "own", [(13, 4)], MICRO.cost, Calibration(MICRO, 2, 4), None)
    assert row.end_to_end == 13 / 9 and 1 <= row.end_to_end_ci95[0] < row.end_to_end < row.end_to_end_ci95[1] <= 17 / 9
    assert row.last_frame_ci95 == (1.0, pytest.approx(17 / 9))


def test_predictions_come_from_medians_of_forwards_and_what_is_drawn():
    steps, cost = 3, MICRO.cost
    found = Calibration(MICRO, steps, 9)
    few, many = found.lengths
    assert not found.known and found.as_dict() == {"keys": [few, many], "e": None}
    a, b, drawn = 1.0, 0.01, 0.25
    for keys in (few, many):
        found.forwards[keys] = [a + b * keys, a + b * keys, 100.0]  # a hiccup is nobody's
    found.draws = [drawn]
    assert found.known and found.line == pytest.approx((a, b))
    seconds = lambda keys: 2 * (steps + 1) * (a + b * keys) + drawn
    full, own = ([seconds(keys(f)) for f in range(1, 9)] for keys in (cost.full_keys, lambda f: cost.budget_keys(f, 1)))
    assert found.speedup(9, 1) == pytest.approx((sum(full) / sum(own), full[-1] / own[-1]))
    linear, attention = (2 * MICRO.shape.linear_parameters, MICRO.shape.attention_flops(1, 1))
    assert found.as_dict()["e"] == pytest.approx((b / attention) / (a / linear))
    found.forwards[many] = [0.5]  # more keys took less: no time is negative
    assert found.line == (found.forwards[few][0], 0.0) and found.speedup(9, 1) == (1.0, 1.0)
    assert found.as_dict()["e"] is None


def test_the_head_is_charged_for_visual_columns_of_masked_rows(monkeypatch, host):
    rows = []
    logits = type(host).logits
    monkeypatch.setattr(type(host), "logits", lambda self, h: rows.append(h.shape[1]) or logits(self, h))
    _drawing(host, 5)()
    cells = MICRO.shape.height // 8 * (MICRO.shape.width // 8)
    assert sum(rows) == drawn_rows(cells, 5) < 5 * cells and len(rows) == 5


def test_bytes_alive_at_most_are_seen_through_frees():
    with torch.no_grad():
        old, watch = torch.zeros(1000), PeakBytes(existing=True)
        watch.start()
        both = torch.cat((old, old))
        del old  # existed before, is given back
        part = both[2:] + 1
        del both
        torch.zeros(10)
        watch.stop()
        watch.stop()
        torch.zeros(10_000)
    assert watch.peak == 4 * (2000 - 1000 + 1998) and len(part) == 1998


@pytest.mark.parametrize("name", ["packcache", "mask-free", "authors-like"])
def test_the_first_two_steps_of_a_frame_need_the_most_memory(host, name):
    """Which is why only that is watched."""
    takes = {
        "packcache": SessionTake(MICRO, host, PackCache(), "resident", 2),
        "mask-free": SessionTake(MICRO, host, FullHistory(), "alias", 2),
        "authors-like": AuthorsTake(MICRO, host, 3, 2),
    }
    clock = Clock(torch.device("cpu"))
    with torch.no_grad(), _forwards(host, clock) as forwards:
        take = takes[name].frames(6)
        for _ in range(5):
            next(take)
        whole = PeakBytes(existing=True)
        whole.start()
        next(take)
        whole.stop()
        arms, _ = _measure({name: takes[name]}, [6], clock, forwards, in_turn=True, progress=silent)
    assert arms[name].peaks[0].transient == whole.peak > 0


def test_memory_at_a_length_is_what_a_take_of_that_length_holds(host):
    free = SessionTake(MICRO, host, FullHistory(), "alias", 2)
    packed = SessionTake(MICRO, host, PackCache(), "resident", 2)
    frame = MICRO.cost.frame_tokens * MICRO.shape.token_bytes
    assert free.allocated(49) - free.allocated(13) >= 36 * 2 * frame  # two streams, and positions
    assert packed.allocated(49) == packed.allocated(13)
    image = torch.zeros(3, host.config.height, host.config.width)
    take = Session(
        host, FullHistory(), prompt_embeds=MICRO.prompt(host, 2), image=image, seed=2, guidance_scale=GUIDANCE,
        num_frames=17, residency="alias", decode=False,
    )  # fmt: skip
    assert free.allocated(5) == take.memory()["total"]


def test_held_bytes_of_the_concatenated_cache_are_without_its_mask(host):
    before = None
    for held, everything in AuthorsTake(MICRO, host, 2, 2).frames(4):
        assert held % MICRO.shape.token_bytes == 0 and everything > held
        assert before is None or held - before == 2 * MICRO.cost.frame_tokens * MICRO.shape.token_bytes
        before = held


def test_a_run_answers_every_length_with_predictions_and_bytes():
    report = run("lumos-micro", frames=(5, 13, 33), seed=2)
    assert list(report.arms) == ["packcache", "mask-free", "authors-like"]
    assert all(len(arm.seconds) == 8 and min(arm.seconds) > 0 for arm in report.arms.values())
    assert all(len(arm.clock_seconds) == 8 and min(arm.clock_seconds) > 0 for arm in report.arms.values())
    assert [(r.pixel_frames, r.latent_frames, r.baseline) for r in report.ratios] == [
        (p, f, b) for p, f in ((5, 2), (13, 4), (33, 9)) for b in ("mask-free", "authors-like")
    ]
    assert not [row for row in report.missing if "cuda" not in row.reason]
    seconds = {name: arm.seconds for name, arm in report.arms.items()}
    clock = {name: arm.clock_seconds for name, arm in report.arms.items()}
    for row in report.ratios:
        n = row.latent_frames - 1
        assert row.end_to_end == sum(seconds[row.baseline][:n]) / sum(seconds["packcache"][:n])
        assert row.last_frame == seconds[row.baseline][n - 1] / seconds["packcache"][n - 1]
        assert row.by_clock[0] == sum(clock[row.baseline][:n]) / sum(clock["packcache"][:n])
        assert row.by_clock[1] == clock[row.baseline][n - 1] / clock["packcache"][n - 1]
        assert row.counted == MICRO.cost.budget_speedup(row.latent_frames, 1.0)
        assert row.predicted is not None and min(row.predicted) >= 1
        assert 0 < row.end_to_end_ci95[0] <= row.end_to_end_ci95[1] and row.last_frame_ci95[0] > 0
    assert {len(values) for values in report.calibration["forwards"].values()} == {6}  # thrice after frames 1 and 7
    n, content, text = MICRO.cost.frame_tokens, MICRO.cost.frame_tokens - 4, MICRO.shape.text_tokens + 3
    constant = (text + 2 * (2 * n + content + 4 * 4)) * MICRO.shape.token_bytes
    assert report.arms["packcache"].held_bytes[4:] == [constant] * 4
    growth = report.arms["authors-like"].held_bytes
    assert all(b > a for a, b in pairwise(growth))
    assert growth == report.arms["mask-free"].held_bytes  # both keep the same tokens
    for name, arm in report.arms.items():
        assert [p.latent_frames for p in arm.peaks] == [2, 4, 9] and all(p.transient for p in arm.peaks)
        totals = [p.total for p in arm.peaks]
        assert totals[0] < totals[2] if name != "packcache" else arm.peaks[1].allocated == arm.peaks[2].allocated
    assert report.counts["authors_mask_bytes"]["33"] == 17 * MICRO.cost.full_keys(8) ** 2
    assert "the authors' L × L mask" in report.markdown() and "of weights" in report.markdown()
    json.dumps(report.as_dict())


def test_on_cuda_the_shape_is_the_1b_one_if_none_is_named(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_packcache, "place", lambda device, shape, instead: seen.append((device, shape)) or 1 / 0)
    for device in ("cuda", "cuda:1", None, "cpu"):
        with pytest.raises(ZeroDivisionError):
            run(device=device)
    assert seen == [
        ("cuda", "lumos-1-1b"), ("cuda:1", "lumos-1-1b"), ("cpu", "lumos-cpu"), ("cpu", "lumos-cpu"),
    ]  # fmt: skip


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
    report.arms["mask-free"].seconds = [2.0 - 0.1 * i for i in range(8)]  # a straight line, falling
    report.judge()
    assert {t.met for t in report.targets if "mask-free" in t.name} == {False}
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
    assert again.as_dict() == data and again.markdown().count("| mask-free |") == 4  # two lengths, one arm, its memory
    assert "mask-free" in result.stdout and (tmp_path / "packcache-cpu.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "nope"}, "no shape 'nope': use one of lumos-cpu"),
        ({"frames": (1,)}, "the first one is given"),
        ({"baselines": ("free",)}, "baseline 'free': use mask-free or authors-like"),
        ({"shape": "lumos-1-3b", "device": "cuda"}, "torch sees no CUDA device"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"steps": 0}, "0 steps"),
        ({"policy": PackCache(rho="auto")}, "rho=auto needs the model's measured decay"),
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
