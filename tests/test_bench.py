"""`longtake bench take`: the measuring is right, and its answer is complete."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from longtake import FullHistory, LongtakeError, Session, SlidingWindow
from longtake.cli import app
from longtake.commands.bench import bench
from longtake.evaluate import bench_suite, bench_take, provenance
from longtake.evaluate.bench_report import Missing, Reached
from longtake.evaluate.bench_take import SHAPES, BareForwards, run
from longtake.evaluate.measure import CountOperations, Figure, bootstrap, live_tensor_bytes, ratios, rss_bytes
from longtake.evaluate.provenance import CpuTimes, others_busy, refuse_if_busy, write_atomically
from longtake.evaluate.take_report import TakeReport
from longtake.samplers.chunked import CLEAN_TIMESTEP

from .tiny import text, tiny_wan


@pytest.fixture(scope="module", autouse=True)
def hurried(quick):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_take, "CODEC_RUNS", 2)
        yield


def take(policy=None, residency="resident", chunks=None) -> Session:
    policy = policy or SlidingWindow(9, sink=3)
    return Session(tiny_wan(), policy, prompt_embeds=text(), decode=False, residency=residency, chunks=chunks)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_interval_of_equal_values_is_a_point():
    assert bootstrap([3.0] * 30) == (3.0, 3.0)


def test_interval_covers_the_median_as_often_as_it_says():
    """95 % intervals of 30 normal values around a known median; 3 standard errors of 200 trials below that."""
    rng = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 30, generator=rng).tolist()
    covered = [low <= 0 <= high for low, high in (bootstrap(s, resamples=1000) for s in samples)]
    assert 0.90 <= sum(covered) / len(covered) <= 1


def test_interval_is_the_same_for_the_same_seed_and_finds_a_shift():
    values = [1.10 + 0.01 * (i % 5) for i in range(30)]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    low, high = bootstrap(values)
    assert 1.05 < low <= 1.12 <= high < 1.15


def test_nothing_measured_has_no_interval():
    with pytest.raises(LongtakeError, match="at least one value"):
        bootstrap([])
    with pytest.raises(LongtakeError, match="positive pairs"):
        ratios([1.0], [0.0])


def test_live_bytes_count_a_storage_once_whatever_its_views():
    before = live_tensor_bytes("cpu")
    kept = torch.empty(1000, dtype=torch.float64)
    views = [kept[::2], kept.view(10, 100), kept.detach()]
    assert live_tensor_bytes("cpu") - before == 8000
    del kept
    assert live_tensor_bytes("cpu") - before == 8000  # a view keeps all of it
    views.clear()
    assert live_tensor_bytes("cpu") == before


def test_live_bytes_notice_a_take_that_keeps_more_with_every_chunk():
    growing, bounded = take(FullHistory()), take()
    for session in (growing, bounded):
        for _ in range(4):
            next(session)
    before = live_tensor_bytes()
    for _ in range(4):
        next(bounded)
    assert live_tensor_bytes() == before
    for _ in range(8):
        next(growing)
    assert live_tensor_bytes() > before


@pytest.mark.skipif(rss_bytes() is None, reason="this system does not tell")
def test_resident_memory_grows_with_what_is_touched():
    # memory mapped anew: an allocator may hand out pages that an earlier test has touched
    fresh = mmap.mmap(-1, 64 << 20)
    before = rss_bytes()
    torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
    assert 60e6 < rss_bytes() - before < 90e6


def test_operations_are_counted_by_name_and_shape():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with CountOperations() as counts:
        a @ b
        a.add_(1).add_(1)
    a @ b  # no longer watched
    assert counts.by_name == {"aten.mm.default": 1, "aten.add_.Tensor": 2}
    assert counts.by_shape["aten.mm.default((2, 3),(3, 4))"] == 1
    assert counts.total == 3


def counted(work):
    with CountOperations() as counts:
        work()
    return counts


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_window_does_the_same_operations_in_every_chunk_and_full_history_does_not(residency):
    for policy, equal in ((SlidingWindow(9, sink=3), True), (FullHistory(), False)):
        session = take(policy, residency, chunks=20)
        for _ in range(6):  # full, and once around the ring of slots
            next(session)
        counts = [counted(lambda: next(session)) for _ in range(5)]  # noqa: B023
        attention = [{k: n for k, n in c.by_shape.items() if "scaled_dot" in k} for c in counts]
        assert all(c.by_name == counts[0].by_name for c in counts) or not equal
        assert all(shapes == attention[0] for shapes in attention) is equal


@torch.no_grad()
def test_bare_forwards_do_the_matrix_products_and_attention_of_a_chunk_and_no_more():
    session = take()
    for _ in range(5):
        next(session)
    host, frame = session.host, session.frame
    chunk = counted(lambda: next(session))
    steps = (*session.schedule.timesteps, CLEAN_TIMESTEP)
    bare = counted(BareForwards(host, host.text_state(text()), steps, session.stats.last.attended_tokens, frame))
    heavy = ("mm", "attention", "convolution")
    of = lambda counts: {k: n for k, n in counts.by_shape.items() if any(word in k.split("(")[0] for word in heavy)}
    assert of(bare) == of(chunk)
    assert any("attention" in key for key in of(bare))
    assert bare.total < chunk.total


# --- who else uses the machine --------------------------------------------------------------------------------------


def test_share_of_others_is_what_this_process_did_not_use():
    before, after = CpuTimes(busy=100, own=10, total=1000), CpuTimes(busy=103, own=12, total=1004)
    assert before.others_until(after) == 0.25
    assert before.others_until(CpuTimes(101, 12, 1004)) == 0  # clocks tick apart: never negative
    assert before.others_until(before) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_another_process_at_work_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            assert others_busy(0.5) > 0.05
        finally:
            busy.kill()


def test_busy_machine_is_refused_with_advice_unless_forced(monkeypatch):
    monkeypatch.setattr(provenance, "others_busy", lambda: 0.4)
    with pytest.raises(LongtakeError, match=r"use 40% of this machine.*15%.*--force"):
        run("cpu-micro", chunks=9, pairs=2)
    refuse_if_busy(0.4, force=True)
    refuse_if_busy(0.1, force=False)
    refuse_if_busy(None, force=False)  # a system that does not tell


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> TakeReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "others_busy", lambda: 0.4)
        return run("cpu-micro", chunks=13, pairs=3, repeats=1, threads=1, force=True, command="longtake bench take")


def test_run_answers_everything_with_count_median_and_interval(report):
    for figure in report.figures:
        assert figure.missing or figure.ci95[0] <= figure.median <= figure.ci95[1]
        assert figure.missing or figure.n == len(figure.values) > 0
    assert report.figure("late / early").n == 3
    late, early = (report.figure(f"{which} chunk").values for which in ("late", "early"))
    assert report.figure("late / early").values == tuple(ratios(late, early))
    assert 0 < report.figure("outside forwards, resident view").median < 1
    assert report.forced and report.others_busy["before"] == 0.4
    assert report.provenance["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report.missing == [Missing("gpu-wan-1.3b", "needs a cuda device, this run was on cpu")]


def test_chunks_are_held_against_the_ceilings_of_this_machine(report):
    dtype = report.settings["dtype"]
    assert report.ceilings.gemm_tflops[dtype] > 0 and report.ceilings.copy_gbs > 0
    bare, chunk = report.reached
    # two steps and the commit of 12 tokens that see 36, by hand: 4 matrices of self-attention, 2 of cross-attention, 2
    # of the MLP, embedding and head; logits and values of self-attention, and of cross-attention to 4 words
    linear = 2 * 12 * (2 * (6 * 24 * 24 + 2 * 24 * 48) + 24 * 32)
    flops = 3 * (linear + 2 * 4 * 12 * 24 * (36 + 4))
    assert bare.rate == pytest.approx(1e-9 * flops / report.figure("bare forwards").median, rel=1e-4)
    assert bare.share == pytest.approx(bare.rate / report.ceilings.gemm_tflops[dtype], rel=1e-4)
    assert chunk.what == "a chunk, resident view" and chunk.resource == dtype


def test_windowed_take_holds_and_does_the_same_early_and_late(report):
    counts = report.counts
    assert counts["chunk"] == [6, 13]
    for name in ("live_tensor_bytes", "attended_tokens", "operations"):
        early, late = counts[name]
        assert early == late > 0
    assert counts["operations_equal_by_name"]
    assert counts["attended_tokens"][0] == 9 * 4  # latent frames of the window, 2 × 2 tokens each
    full, window = report.curves["full history"], report.curves["window"]
    assert full.attended == [12 * n for n in range(1, 9)]
    assert window.attended == [min(36, n) for n in full.attended]
    assert len(full.chunk_ms[0]) == len(window.outside_ms[0]) == 8


def test_reduced_run_judges_no_target(report):
    assert all(target.met is None and "not the full setting" in target.note for target in report.targets)


def test_timing_on_a_busy_machine_is_not_judged_but_counts_are(report):
    full = TakeReport.of(report.as_dict())
    full.settings |= {"chunks": 300, "pairs": 30}
    full.others_busy["during"] = 0.5
    met = {t.name: t.met for t in bench_take._targets(full)}
    assert met["late / early"] is None and met["outside forwards, resident view"] is None
    assert met["live tensor bytes at chunk 6 and 13"] is True
    full.others_busy["during"] = 0.01
    full.figures = [Figure.of(f.name, f.unit, [1.2] * 30) if f.name == "late / early" else f for f in full.figures]
    full.counts["live_tensor_bytes"][1] += 1
    met = {t.name: t.met for t in bench_take._targets(full)}
    assert met["late / early"] is False
    assert met["live tensor bytes at chunk 6 and 13"] is False


def test_report_survives_its_file(report, tmp_path):
    data, picture = report.write(tmp_path / "made", "take-cpu")
    again = TakeReport.read(data)
    assert again.as_dict() == report.as_dict() == json.loads(data.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000
    assert sorted(p.name for p in data.parent.iterdir()) == ["take-cpu.json", "take-cpu.png"]
    data.write_text(json.dumps({**report.as_dict(), "schema": 0}))
    with pytest.raises(LongtakeError, match="schema 0"):
        TakeReport.read(data)
    data.write_text(json.dumps({**report.as_dict(), "benchmark": "golf"}))
    with pytest.raises(LongtakeError, match="'golf' is not one of roofline, take"):
        bench_suite.read(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("figures", 0, "median"), "quick", r"figures\[0\].median is 'quick', not float"),
        (("figures", 0, "ci95"), [1.0], r"figures\[0\].ci95 is .*not a list of 2"),
        (("others_busy", "during"), True, "others_busy.during is 'True', not float"),
        (("curves", "window", "attended", 1), 1.5, r"curves.window.attended\[1\] is '1.5', not int"),
        (("targets", 0, "met"), "yes", r"targets\[0\].met is 'yes', not bool"),
        (("ceilings",), {"copy_gbs": 1.0}, "ceilings: 'gemm_tflops' is missing"),
        (("colour",), "blue", "nothing here is named 'colour'"),
        (("command",), None, "command is 'None', not a text"),
    ],
)
def test_a_file_that_is_not_as_the_schema_says_is_refused_with_its_place(report, path, value, message):
    data = json.loads(json.dumps(report.as_dict()))
    at = data
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(LongtakeError, match=message):
        TakeReport.of(data)


def test_a_missing_field_is_named(report):
    data = report.as_dict()
    del data["provenance"]
    with pytest.raises(LongtakeError, match="'provenance' is missing"):
        TakeReport.of(data)


def test_what_was_not_measured_has_no_share(report):
    alone = TakeReport.of({**report.as_dict(), "ceilings": None})
    alone.reached.clear()
    alone.reach("a chunk", "float32", 0.1)
    assert alone.reached == [Reached("a chunk", "float32", 0.1, None)]
    assert "its ceiling is not known" in alone.text() and "not known" in alone.markdown()


def test_missing_figure_keeps_its_reason():
    row = Figure.absent("decode", "ms", "no VAE").as_dict()
    assert row == {"name": "decode", "unit": "ms", "missing": "no VAE"}
    assert Figure.read(row) == Figure.absent("decode", "ms", "no VAE")


def test_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LongtakeError, match="cannot write"):
        write_atomically(tmp_path / "file" / "x.json", b"{}")
    (tmp_path / "taken").mkdir()
    with pytest.raises(LongtakeError, match="cannot write"):
        write_atomically(tmp_path / "taken", b"{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "nosuch"}, "no shape 'nosuch': use one of cpu-small"),
        ({"dtype": "int3"}, "dtype 'int3': use one of float32"),
        ({"chunks": 5}, "at least 8 chunks"),
        ({"pairs": 1}, "2 pairs"),
        ({"threads": 0}, "0 threads"),
        ({"device": "fridge"}, "use cpu or cuda"),
        ({"device": "meta"}, "is for cpu"),
    ],
)
def test_wrong_settings_are_said_before_any_work(monkeypatch, options, message):
    monkeypatch.setattr(provenance, "others_busy", lambda: pytest.fail("work began"))
    with pytest.raises(LongtakeError, match=message):
        run(**{"shape": "cpu-micro", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_shape_without_a_gpu_is_one_clear_line():
    result = CliRunner().invoke(app, ["bench", "take", "--shape", "gpu-wan-1.3b"])
    assert result.exit_code == 2
    assert "sees no CUDA device" in result.output and "Traceback" not in result.output


def test_command_writes_both_files_and_answers_in_json(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "others_busy", lambda: 0.0)
    options = ["--shape", "cpu-micro", "--chunks", "8", "--pairs", "2", "--threads", "1", "--json"]
    result = CliRunner().invoke(app, ["bench", "take", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "take-cpu.json").read_text())
    assert (tmp_path / "take-cpu.png").exists()


def test_command_line_loads_no_torch_before_it_measures():
    code = "import sys, longtake.commands.bench; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


def test_named_shapes_are_valid_takes():
    for shape in SHAPES.values():
        assert shape.early > shape.window // shape.chunk_frames  # the window is full well before
        assert (shape.window - shape.sink) % shape.chunk_frames == 0


ROOT = Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "benchmarks").glob("*.json"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_reports_are_as_the_schema_says_and_say_how_they_were_made(path):
    if "benchmark" not in json.loads(path.read_text()):
        pytest.skip("no report of the suite")
    report = bench_suite.read(path)
    assert report.as_dict() == json.loads(path.read_text())
    assert report.command.startswith("longtake bench ") and report.provenance["git"]["commit"]
    timed = report.settings.get("rounds") != 0  # of takes that were only looked at, nothing depends on an idle machine
    assert not (report.busy and timed) and not report.provenance["git"]["dirty"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_state_what_the_committed_reports_found(path):
    text = path.read_text(encoding="utf-8")
    if "<!-- bench:" in text or "<!-- compare:" in text:
        assert bench_suite.fill(text, ROOT / "benchmarks") == text, "run: longtake bench table --into " + path.name


def test_tables_are_filled_by_name_and_a_report_that_is_not_there_is_said(report, tmp_path):
    report.write(tmp_path, "take-cpu")
    document = tmp_path / "doc.md"
    document.write_text("a\n<!-- bench:take -->\nold\n<!-- /bench:take -->\nb\n")
    result = CliRunner().invoke(app, ["bench", "table", "--into", str(document), "--from", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert document.read_text() == f"a\n<!-- bench:take -->\n{report.markdown()}\n<!-- /bench:take -->\nb\n"
    assert "| gpu-wan-1.3b | | missing: needs a cuda device" in document.read_text()
    document.write_text("<!-- bench:golf -->\n<!-- /bench:golf -->\n")
    result = CliRunner().invoke(app, ["bench", "table", "--into", str(document), "--from", str(tmp_path)])
    assert result.exit_code == 2 and "no golf.json or golf-cpu.json" in result.output
    document.write_text("nothing")
    result = CliRunner().invoke(app, ["bench", "table", "--into", str(document), "--from", str(tmp_path)])
    assert result.exit_code == 2 and "has no <!-- bench:NAME -->" in result.output


def test_without_a_name_the_suite_is_listed_with_what_each_measures_and_takes():
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 0
    for entry in bench_suite.SUITE.values():
        assert entry.name in result.stdout and entry.measures in result.stdout and entry.shapes[0] in result.stdout
    own = {command.name for command in bench.registered_commands}
    assert own - {"table"} == bench_suite.SUITE.keys()


def test_ceilings_are_the_best_that_was_seen(tmp_path):
    command = ["bench", "roofline", "--shape", "micro", "--force", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "roofline-cpu.json").read_text())
    assert found["gemm_tflops"].keys() == {"float32", "bfloat16"} and found["copy_gbs"] > 0
    assert found["ceilings"] == {"gemm_tflops": found["gemm_tflops"], "copy_gbs": found["copy_gbs"]}
    for dtype, best in found["gemm_tflops"].items():
        rates = [x for f in found["figures"] if f["name"].startswith(dtype) for x in f["values"]]
        assert best == max(rates) > 0
    assert found["copy_gbs"] == max(found["figures"][-1]["values"])
    again = bench_suite.read(tmp_path / "roofline-cpu.json")
    assert f"| copies, read and written | {found['copy_gbs']:.3g} GB/s |" in again.markdown()
