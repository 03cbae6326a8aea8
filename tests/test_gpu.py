"""The GPU path on a CPU: recorded chunk loops replay what they recorded, and the GPU benchmark runs on tiny shapes and
says of everything else that it is missing."""

import json

import pytest
import torch

from longtake import LongtakeError, PackForcing, Session, SlidingWindow
from longtake.evaluate.bench_suite import read
from longtake.evaluate.gpu.bench import run
from longtake.evaluate.gpu.models import SHAPES
from longtake.evaluate.gpu.precision import history_errors
from longtake.replay import Replay

from .test_equivalences import latents_of
from .tiny import text, tiny_wan

GUIDED = {"guidance_scale": 3.0, "negative_prompt_embeds": text(seed=9)}


def take_of(policy=None, **options) -> Session:
    options = {"prompt_embeds": text(), "decode": False} | options
    return Session(options.pop("host", None) or tiny_wan(), policy or SlidingWindow(9, sink=3), **options)


def recorded(take: Session, record=lambda work: work) -> Session:
    """The take, its forwards recorded as on a GPU; a replay computes again, on the tensors of the recording."""
    take.rollout.replay = Replay(take.host, record)
    return take


# --- recorded chunk loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_recorded_take_is_the_take(form):
    """To the bit, while the window fills, when it is full, and after a new prompt; with guidance."""
    plain, replayed = take_of(history_dtype=form, **GUIDED), recorded(take_of(history_dtype=form, **GUIDED))
    for number in range(9):
        assert torch.equal(next(replayed).latents, next(plain).latents)
        if number == 6:
            for take in (plain, replayed):
                take.set_prompt_embeds(text(seed=4))
    # two steps, two streams: chunk 2 is the first of a full window, 3 is recorded, 4 to 6 are replayed; then the stream
    # with the new prompt begins anew, and the other goes on
    assert replayed.rollout.replay.replayed == 3 * 2 * 2 + 2 * 2
    assert replayed.memory()["graphs"] == replayed.rollout.replay.nbytes > 0


def test_a_recording_that_did_nothing_would_be_noticed():
    def run_once(work):
        work()  # its buffer holds the recorded chunk's values: an uninitialised one may hold anything, NaN too
        return lambda: None

    plain, stale = take_of(), recorded(take_of(), record=run_once)
    assert torch.equal(latents_of(plain, 4), latents_of(stale, 4))
    assert not torch.equal(latents_of(plain, 3), latents_of(stale, 3))


def test_open_choices_and_one_layers_view_are_computed_not_replayed():
    for options in ({"policy": PackForcing(sink=1, top_k=2, recent=1, archive=3)}, {"residency": "scratch"}):
        plain, take = take_of(**options), recorded(take_of(**options))
        assert torch.equal(latents_of(take, 7), latents_of(plain, 7))
        assert options.get("residency") != "scratch" or take.rollout.replay.replayed == 0


def test_recordings_do_not_pile_up():
    take = recorded(take_of())
    latents_of(take, 6)
    held = take.rollout.replay.nbytes
    latents_of(take, 4)
    assert take.rollout.replay.nbytes == held
    for seed in range(3):
        take.set_prompt_embeds(text(seed=seed))
        latents_of(take, 3)
        assert take.rollout.replay.nbytes == held


def test_graphs_are_refused_on_a_cpu_in_one_line():
    with pytest.raises(LongtakeError, match="cuda_graphs needs a CUDA device, this model is on cpu") as error:
        take_of(cuda_graphs=True)
    assert "\n" not in str(error.value)


# --- precision --------------------------------------------------------------------------------------------------------


def test_quantised_history_errs_as_much_as_stated():
    """On the keys and values of a model: fp32 not at all, bf16 by a third of a percent, codes by more."""
    rows = {r.form: r for r in history_errors(tiny_wan(), "tiny", 4, prompt_embeds=text())}
    assert rows["float32"].error == 0
    assert 1e-4 < rows["bfloat16"].error < rows["int8"].error < 0.02
    assert rows["int8"].error < rows["fp8"].error < 0.06
    assert all(r.error <= r.worst_layer for r in rows.values())
    assert [rows[form].token_bytes for form in ("float32", "bfloat16", "int8", "fp8")] == [96, 48, 32, 32]


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro():
    return run("micro", device="cpu", force=True, command="longtake bench gpu --shape micro")


def test_every_forward_of_the_tiny_models_is_run_and_takes_are_summed_from_them(micro):
    assert {row.how for row in micro.forwards} == {"run"}
    assert {row.model for row in micro.forwards} == {m.shape.name for m in SHAPES["micro"]}
    seconds = {(row.model, row.tokens, row.keys, row.text): row.seconds for row in micro.forwards}
    assert all(value > 0 for value in seconds.values())
    summed = [row for row in micro.totals if row.how == "summed"]
    assert {row.model for row in summed} == {m.shape.name for m in SHAPES["micro"]}
    wan = next(row for row in summed if row.model == "micro-wan")
    parts = [value for (model, *_), value in seconds.items() if model == "micro-wan"]
    assert min(parts) * wan.forwards <= wan.seconds <= max(parts) * wan.forwards


def test_whole_chunks_of_the_tiny_models_are_run(micro):
    chunks = [row for row in micro.totals if row.what.startswith("chunk")]
    assert {row.model for row in chunks if row.how == "run"} == {m.shape.name for m in SHAPES["micro"]}
    assert not [row for row in chunks if row.how != "run"], chunks


def test_what_needs_a_gpu_is_missing_with_its_reason(micro):
    for row in micro.paths:
        wants_gpu = row.way.endswith("triton") or row.way == "CUDA graphs"
        assert (row.how, row.seconds is None) == (("missing", True) if wants_gpu else ("run", False)), row
        assert not wants_gpu or "CUDA device" in row.reason


def test_the_report_is_read_back_as_it_was_written(micro, tmp_path):
    path, *_ = micro.write(tmp_path, "gpu-cpu")
    assert read(path).as_dict() == json.loads(path.read_text())
    assert "summed" in micro.text() and "missing" in micro.markdown()


def test_without_a_gpu_the_published_models_are_rows_that_say_so():
    report = run(device="cpu", force=True)
    assert {row.how for row in (*report.forwards, *report.totals, *report.paths)} == {"missing"}
    assert {row.model for row in report.forwards} == {m.shape.name for m in SHAPES["published"]}
    assert all(row.reason == "needs a CUDA device, this run was on cpu" for row in report.forwards)
    wan = {row.keys for row in report.forwards if row.model == "wan-1.3b" and row.tokens == 4680}
    assert wan >= {4680 * n for n in range(1, 8)}
    assert report.errors
