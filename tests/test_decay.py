"""Measured attention: exact masses, no trace in the video, and the decay they fit."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import longtake
from longtake import FullHistory, LongtakeError, PackCache, Session
from longtake.attention import logits
from longtake.cli import app
from longtake.evaluate.attention_mass import ChunkMass, MassProbe, Segment, heat_rows, sample
from longtake.evaluate.canvas import canvas
from longtake.evaluate.compare.cells import fingerprint
from longtake.evaluate.compare.footage import Footage
from longtake.evaluate.decay import DecayReport, fit, measure, measure_truth
from longtake.evaluate.decay_figures import draw_fit, fit_figure
from longtake.evaluate.decay_note import with_decay, without_decay
from longtake.hosts.base import HostConfig
from longtake.hosts.loading import embedded
from longtake.zoo import lanes

from .tiny import text, tiny_wan

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# --- the fit ----------------------------------------------------------------------------------------------------------


def test_an_exact_exponential_is_found_again():
    found = fit(range(1, 9), [0.3 * 0.62**d for d in range(1, 9)])
    assert (found.rho, found.c, found.r2) == pytest.approx((0.62, 0.3, 1.0))
    assert found.half_life == pytest.approx(math.log(2) / -math.log(0.62))


def test_eight_noisy_points_give_rho_within_a_percent():
    rng = np.random.default_rng(1)
    masses = [0.3 * 0.62**d * math.exp(0.03 * rng.standard_normal()) for d in range(1, 9)]
    found = fit(range(1, 9), masses)
    assert found.rho == pytest.approx(0.62, abs=0.01) and found.r2 > 0.995


def test_an_age_weighs_as_often_as_it_was_seen():
    ages, masses = [1, 2, 3, 4], [0.4, 0.2, 0.1, 0.4]
    assert fit(ages, masses, [1000, 1000, 1000, 1e-9]).rho == pytest.approx(0.5, abs=1e-3)
    assert fit(ages, masses).rho > 0.7


def test_vanishing_masses_are_left_out_and_two_points_are_needed():
    assert fit([1, 2, 3], [0.4, 0.2, 1e-9]).ages == 2
    assert fit([1, 2], [0.4, 1e-9]) is None and fit([1], [0.4]) is None


def test_attention_that_grows_with_age_never_halves():
    assert fit([1, 2, 3], [0.1, 0.2, 0.4]).half_life == math.inf


# --- the masses -------------------------------------------------------------------------------------------------------


def run(host, policy, chunks: int = 4, probe: bool = False, **options):
    take = Session(host, policy, prompt_embeds=text(), decode=False, seed=2, **options)
    watch = MassProbe(take.history, queries=10_000, heat_layers=(1,))
    if probe:
        with watch.watching():
            latents = [next(take).latents for _ in range(chunks)]
    else:
        latents = [next(take).latents for _ in range(chunks)]
    return torch.stack(latents), watch


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("policy", [FullHistory(), PackCache(2.0), PackCache(selection="attention")], ids=str)
def test_watching_changes_no_bit_of_the_video(policy, residency):
    seen, watch = run(tiny_wan(), policy, probe=True, residency=residency)
    unseen, _ = run(tiny_wan(), policy, residency=residency)
    assert torch.equal(seen, unseen) and len(watch.chunks) == 4


def test_nothing_is_watched_after_the_probe_is_gone():
    take = Session(tiny_wan(), prompt_embeds=text(), decode=False)
    watch = MassProbe(take.history)
    with watch.watching():
        next(take)
    next(take)
    assert len(watch.chunks) == 1 and take.history.probe is None


def test_every_segment_is_named_with_its_age_and_masses_sum_to_one():
    _, watch = run(tiny_wan(), FullHistory(), probe=True)
    last = watch.chunks[-1]
    assert [(s.kind, s.frame, s.age) for s in last.segments] == [
        *(("history", f, 9 - f) for f in range(9)), ("current", 9, 0)
    ]  # fmt: skip
    assert [s.tokens for s in last.segments] == [6] * 9 + [18]
    assert last.array().shape == (2, 3, 10)  # steps, layers, segments
    assert np.allclose(last.array().sum(-1), 1, atol=1e-6)


def test_masses_are_those_of_the_dense_softmax(monkeypatch):
    """The slow obvious twin: all rows of the softmax at once, summed over the keys of a frame."""
    dense: list[list[float]] = []

    def record(q, k):
        mass = logits(q, k).softmax(-1).mean((0, 1, 2))
        dense.append([*mass[:-18].unflatten(0, (-1, 6)).sum(-1).tolist(), float(mass[-18:].sum())])

    take = Session(tiny_wan(), FullHistory(), prompt_embeds=text(), decode=False, seed=2)
    for _ in range(2):
        next(take)
    layers = take.history.layers

    def watched(*args, **options):
        views = layers(*args, **options)
        for view in views:
            measured = view.observe
            view.observe = lambda q, k, measured=measured: (measured(q, k) if measured else None, record(q, k))
        return views

    monkeypatch.setattr(take.history, "layers", watched)
    watch = MassProbe(take.history, queries=10_000)
    with watch.watching():
        next(take)
    found = watch.chunks[0].array().reshape(-1, 7)
    assert np.allclose(found, dense[: len(found)], atol=2e-6)


def test_packed_frames_are_segments_of_what_is_left_of_them():
    _, watch = run(tiny_wan(), PackCache(1.0, max_frames=4), probe=True)
    assert [(s.kind, s.frame, s.tokens) for s in watch.chunks[-1].segments] == [
        ("history", 5, 1), ("history", 6, 1), ("history", 7, 1), ("history", 8, 3), ("current", 9, 18)
    ]  # fmt: skip


def test_anchor_frames_are_no_history():
    take = Session(tiny_wan(), FullHistory(), prompt_embeds=text(), decode=False)
    watch = MassProbe(take.history, anchors=1)
    with watch.watching():
        next(take)
        next(take)
    assert [s.kind for s in watch.chunks[-1].segments] == ["anchor", "history", "history", "current"]


def test_queries_are_sampled_evenly_to_both_ends():
    q = torch.arange(100.0).view(1, 100, 1, 1)
    assert sample(q, 4).flatten().tolist() == [0, 33, 66, 99]
    assert sample(q, 200) is q


def test_a_heat_map_is_the_softmax_gathered_into_bins_within_segments():
    q, k, lengths = torch.randn(1, 7, 4, 8), torch.randn(1, 30, 2, 8), [3, 17, 10]
    rows, borders = heat_rows(q, k, lengths, 30)
    exact = logits(q, k).softmax(-1).mean((0, 1)).numpy()
    assert borders == [0, 3, 20] and np.allclose(rows, exact, atol=1e-6)
    few, borders = heat_rows(q, k, lengths, 6)
    assert few.shape == (7, 1 + 3 + 2) and borders == [0, 1, 4]
    assert np.allclose(few[:, 0], exact[:, :3].mean(1), atol=1e-6)
    assert np.allclose(few[:, 4], exact[:, 20:25].mean(1), atol=1e-6)


# --- the report -------------------------------------------------------------------------------------------------------


def made_up(rho: float = 0.5) -> DecayReport:
    """Chunks of one frame whose history gets 0.4·ρ^d, the same in two steps and two layers."""
    chunks = []
    for frame in range(1, 6):
        past = [Segment("history", 10, f, frame - f) for f in range(frame)]
        mass = [0.4 * rho**s.age for s in past]
        row = [*mass, 1 - sum(mass)]
        chunks.append(ChunkMass("cond", frame, [*past, Segment("current", 10, frame)], [[row, row], [row, row]]))
    return DecayReport("made up", "full", "cond", [{"prompt": "", "seed": 0}], chunks, {})


def test_the_report_averages_by_age_and_fits_all_layers():
    report = made_up(0.62)
    ages, mass, count = report.by_age()
    assert ages.tolist() == [1, 2, 3, 4, 5] and count.tolist() == [5, 4, 3, 2, 1]
    assert np.allclose(mass[1, 1], [0.4 * 0.62**d for d in ages])
    assert report.decay().rho == report.decay(1).rho == pytest.approx(0.62)
    assert np.allclose(report.by_age(per_token=True)[1] * 10, mass)
    data = report.as_dict()
    assert data["rho"] == pytest.approx(0.62) and len(data["fit_per_layer"]) == 2
    assert data["budget"]["rho 0.5"] == [0.5, 0.25, 0.125, 0.125]
    assert sum(data["budget"]["rho 0.62"]) == pytest.approx(1)


def test_a_take_without_history_is_refused():
    report = made_up()
    report.chunks = [ChunkMass("cond", 0, [Segment("current", 10, 0)], [[[1.0]]])]
    with pytest.raises(LongtakeError, match="no chunk had any history"):
        report.by_age()


def test_measuring_a_host_gives_masses_fits_and_figures(tmp_path):
    host = tiny_wan(guidance=2.0)
    report = measure(
        host, [None], seeds=[0, 1], chunks=3, stream="uncond", prompt_embeds=text(),
        negative_prompt_embeds=text(seed=4), heat_layers=[0, 2],
    )  # fmt: skip
    assert len(report.chunks) == 6 and {c.stream for c in report.chunks} == {"uncond"}
    assert report.by_age()[0].tolist() == [1, 2, 3, 4, 5, 6]
    written = report.write(tmp_path)
    assert [p.name for p in written] == ["decay.json", "decay-fit.png", "decay-steps.png", "decay-heatmap.png"]
    data = json.loads((tmp_path / "decay.json").read_text())
    assert data["chunks"][2]["segments"][0] == {"kind": "history", "frame": 0, "age": 6, "tokens": 6}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in written[1:])


def test_the_figure_shows_what_was_measured_the_fitted_line_and_the_budget_over_it():
    report = made_up(0.62)
    figure, (left, right) = canvas(9, 3.6, 1, 2)
    draw_fit(report, left, right)
    lines = {line.get_label(): line for line in left.get_lines()}
    ages = np.arange(1, 6)
    measured, fitted = lines["measured, mean of layers"], lines["ρ = 0.620, R² = 1.000"]
    assert np.allclose(measured.get_xdata(), ages) and np.allclose(measured.get_ydata(), 0.4 * 0.62**ages)
    assert np.allclose(fitted.get_xdata(), ages) and np.allclose(fitted.get_ydata(), 0.4 * 0.62**ages)
    total = (0.4 * 0.62**ages).sum()
    paper, own = lines["budget, rho 0.5"], lines["budget, rho 0.62"]
    assert np.allclose(paper.get_ydata(), total * np.array([0.5, 0.25, 0.125, 0.125]))
    shares = 0.62**ages / (0.62**ages).sum()
    assert np.allclose(own.get_xdata(), ages) and np.allclose(own.get_ydata(), total * shares)
    assert [t.get_text() for t in left.get_legend().get_texts()] == [name for name in lines if not name.startswith("_")]
    dots, rule = right.get_lines()
    assert np.allclose(dots.get_xdata(), [0.62, 0.62]) and np.allclose(rule.get_xdata(), [0.62, 0.62])
    assert fit_figure(report)[:4] == b"\x89PNG" and figure.axes == [left, right]


def test_a_policy_whose_heads_see_different_keys_is_refused():
    from longtake import Choose, KVPolicy, Plan

    class Chooses(KVPolicy):
        requires = frozenset({"key_sums"})

        def plan(self, table, signals):
            return Plan(tuple(Choose((b.id,), 1) for b in table.blocks))

        def score(self, q, k):
            return k.sum((2, 3))

        def capacity(self, shape):
            return None

    take = Session(tiny_wan(), Chooses(), prompt_embeds=text(), decode=False)
    next(take)
    with MassProbe(take.history).watching(), pytest.raises(LongtakeError, match="use full, window or packcache"):
        next(take)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_the_embedded_model(tmp_path):
    asked = f"analyze decay --chunks 3 --prompt x --size 32x32 --out {tmp_path} --json"
    result = CliRunner().invoke(app, asked.split())
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["model"] == "tiny-shapes" and data["rho"] > 0 and data["ages"] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "decay-fit.png", "decay-heatmap.png", "decay-steps.png", "decay.json"
    ]  # fmt: skip


def test_saving_puts_rho_into_the_models_description_and_changes_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(embedded()["tiny-shapes"], folder)
    home = folder / "longtake.json"
    home.write_text(without_decay(home.read_text()))
    before, known, files = home.read_text(), fingerprint(folder), {p: p.stat().st_mtime_ns for p in _files(folder)}
    with pytest.raises(LongtakeError, match="rho=auto needs the model's measured decay"):
        Session(longtake.load(folder, device="cpu"), PackCache(rho="auto"), prompt="x", decode=False)
    monkeypatch.setattr("longtake.evaluate.decay.measure", lambda *args, **options: made_up(0.62))
    asked = ["analyze", "decay", "--model", str(folder), "--out", str(tmp_path / "out"), "--save"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0 and str(home) in result.stderr, result.stderr
    assert json.loads(home.read_text()) == json.loads(before) | {"decay": 0.62}
    assert {p for p in _files(folder) if p.stat().st_mtime_ns != files[p]} == {home}
    assert fingerprint(folder) == known and without_decay(home.read_text()) == before
    take = Session(longtake.load(folder, device="cpu"), PackCache(rho="auto"), prompt="x", decode=False)
    assert take.policy.rho == 0.62
    monkeypatch.setattr("longtake.evaluate.decay.measure", lambda *args, **options: made_up(0.4))
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert json.loads(home.read_text())["decay"] == 0.4 and fingerprint(folder) == known
    monkeypatch.setattr("longtake.evaluate.decay.measure", lambda *args, **options: made_up(1.1))
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and "attention does not decay here" in result.stderr
    assert json.loads(home.read_text())["decay"] == 0.4


def _files(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("text", "noted"),
    [
        ('{\n  "a": 1\n}\n', '{\n  "a": 1,\n  "decay": 0.83\n}\n'),
        ('{"a": "the \\"decay\\": 1"}', '{"a": "the \\"decay\\": 1",\n  "decay": 0.83\n}'),
        ('{\n  "decay": null,\n  "a": [1]\n}', '{\n  "decay": 0.83,\n  "a": [1]\n}'),
    ],
)
def test_a_note_of_decay_goes_in_and_out_without_a_trace(text, noted):
    found = with_decay(text, 0.83)
    assert found == noted and json.loads(found)["decay"] == 0.83
    assert with_decay(found, 0.5) == noted.replace("0.83", "0.5")
    assert json.loads(without_decay(found)) == json.loads(text)
    if not text.endswith('1"}'):  # a description all on one line is known by another text, the same ever after
        assert without_decay(found) == text
    assert without_decay(with_decay(found, 0.5)) == without_decay(found)


@pytest.mark.parametrize("name", ["tiny-shapes", "tiny-wan", "tiny-wan-long"])
def test_rho_auto_works_on_the_embedded_models_whose_weights_are_known_as_before(name):
    folder = embedded()[name]
    assert 0 < HostConfig.read(folder).decay < 1
    assert fingerprint(folder) == {
        "tiny-shapes": "e99b3d3d852982ac", "tiny-wan": "62ca21767431dee4", "tiny-wan-long": "461879bf3cc17117",
    }[name]  # fmt: skip
    told = json.loads((BENCHMARKS / "decay" / name / "decay.json").read_text())
    assert HostConfig.read(folder).decay == round(told["rho"], 4)
    assert {take["past"] for take in told["takes"]} == {"own" if name == "tiny-shapes" else "true"}


def test_true_pasts_are_committed_and_only_the_next_chunk_is_watched():
    host = longtake.load("tiny-wan", device="cpu")
    host.config = replace(host.config, timesteps=(1000, 500))
    report = measure_truth(host, seeds=[3], chunks=3, queries=8, heat_layers=[0])
    assert [c.frame for c in report.chunks] == [3, 6] and report.takes[0]["past"] == "true"
    assert report.by_age()[0].tolist() == [1, 2, 3, 4, 5, 6] and len(report.heat) == 1
    footage = Footage(host, 3, 9, lanes.GAPS)
    take = Session(
        host, FullHistory(), prompt=footage.scene.caption, seed=3, height=128, width=128, decode=False, chunks=3
    )
    take.extend(footage.latents(9)[:, :, :6])
    with MassProbe(take.history, queries=8).watching() as probe:
        take.noise = take.sampler.noise([torch.Generator().manual_seed(3)])
        next(take)
    assert np.allclose(probe.chunks[0].array(), report.chunks[1].array(), atol=1e-6)
    with pytest.raises(LongtakeError, match="is of no world whose truth is known"):
        measure_truth(tiny_wan())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--past false", "--past 'false': use one of true, own"),
        ("--model tiny-wan --past true --prompt x", "leave --prompt and --size out"),
        ("--past true", "tiny-shapes is of no world whose truth is known"),
        ("--chunks 0", "--chunks 0: give at least 1"),
        ("--anchors -1", "--anchors -1: give 0 or more"),
        ("--model nowhere --save", "--save writes into longtake.json of a model folder"),
        ("--stream uncond --prompt x", "no stream 'uncond' here: this take has cond"),
        ("--policy nope", "no policy 'nope'"),
    ],
)
def test_a_wrong_question_gets_one_line(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["analyze", "decay", "--out", str(tmp_path), *arguments.split()])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
