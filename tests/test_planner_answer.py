"""What `longtake plan` answers beside counts: work and seconds, how a take stands to a card, what a card can run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import longtake
from longtake import LongtakeError, Session, SlidingWindow
from longtake.cli import app
from longtake.commands.shell import bytes_text
from longtake.planner import CARDS, PlanRequest, Room, answer, ceilings, memory, models, plan, runnable
from longtake.planner.answer import longest, short
from longtake.policies import FullHistory, PackForcing, parse
from longtake.serve.admission import footprint, measure, shape_of

GB = 10**9
CARD = Room("24GB", 24 * GB)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def told(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- work and seconds -------------------------------------------------------------------------------------------------

TAKES = {
    "wan-1.3b": {"chunks": 8, "policy": PackForcing()},
    "lumos-1-3b": {"frames": 48},
    "skyreels-v2-1.3b": {"chunks": 10, "steps": 10},
    "magi-4.5b": {"chunks": 6, "steps": 16},
    "magi-4.5b-base": {"chunks": 3, "steps": 8},
}


@pytest.mark.parametrize("model", TAKES)
def test_the_forwards_of_a_take_add_up_to_its_flops(model):
    request = PlanRequest(**{"model": model, "policy": parse(models()[model].own), **TAKES[model]})
    counts, work = plan(request), answer(request)["work"]
    parts = counts["flops"] if isinstance(counts["flops"], dict) else {"total": {"total": counts["flops"]}}
    total, text = parts["total"]["total"], parts.get("text", {"total": 0})["total"]
    assert work["take"]["flops"] == total - text  # the text's keys and values are made once, by no forward
    assert work["take"]["flops"] == sum(row["flops"] for row in work["chunks"])
    assert work["take"]["seconds"] is None and work["ceilings"] is None


def test_seconds_are_those_of_the_ceiling_that_binds():
    request = PlanRequest(model="wan-1.3b", chunks=8, policy=SlidingWindow())
    fast = lambda **known: answer(request, known=ceilings(**known))["work"]["take"]
    flops, moved = fast(tflops=100)["flops"], fast(tflops=100)["bytes"]
    assert fast(tflops=100)["seconds"] == pytest.approx(flops / 1e14)
    assert fast(bandwidth=10)["seconds"] == pytest.approx(moved / 1e10)
    both = fast(tflops=100, bandwidth=10)["seconds"]
    assert max(flops / 1e14, moved / 1e10) <= both <= flops / 1e14 + moved / 1e10
    assert fast(tflops=200)["seconds"] == pytest.approx(flops / 2e14)


def test_a_forward_reads_its_weights_and_all_keys_and_values_at_least():
    work = answer(PlanRequest(model="wan-1.3b", chunks=8, policy=SlidingWindow()))["work"]
    last = work["last_chunk"]
    assert last["bytes"] > last["forwards"] * (21 * 1560 * 184_320 + 2.8e9)
    assert last["flops"] > work["chunks"][0]["flops"]


def test_measured_ceilings_come_before_nominal_ones_and_given_ones_before_both(tmp_path: Path):
    file = tmp_path / "roofline.json"
    file.write_text(json.dumps({"schema": 1, "gemm_tflops": {"float32": 50.0, "bfloat16": 700.0}, "copy_gbs": 2500.0}))
    card = CARDS["h100"]
    nominal, measured = ceilings(card), ceilings(card, file)
    assert nominal is not None and nominal.source.startswith("nominal: H100") and nominal.tflops == card.tflops
    assert measured is not None and (measured.tflops, measured.bandwidth) == (700, 2500)
    assert measured.source == "measured: roofline.json bfloat16"
    single = ceilings(card, file, itemsize=4)
    assert single is not None and single.tflops == 50
    given = ceilings(card, file, tflops=400)
    assert given is not None and (given.tflops, given.bandwidth) == (400, 2500) and given.source.startswith("given")
    assert ceilings() is None


# --- one arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["window", "packforcing:sink=1,top_k=2,archive=3", "packcache:rho=auto"])
def test_an_embedded_model_is_planned_as_its_session_allocates_and_a_server_admits(policy):
    host = longtake.load("tiny-wan", device="cpu")
    method = parse(policy)
    vram = told("-m", "tiny-wan", "--chunks", "12", "-p", policy, "--dtype", "float32")["vram"]
    take = Session(host, method, chunks=12, prompt=host.config.prompts[0])
    assert vram["history"] + vram["live"] == take.memory()["store"] and vram["view"] == take.memory()["view"]
    assert vram["weights"] == sum(size for part, size in host.memory().items() if part != "text_encoder")
    shape = shape_of(host, host.geometry(), measure(host), None, None, 12)
    need = footprint(host, host.geometry(), method, shape, measure(host), keep_latents=False)
    assert (need.store, need.view) == (vram["history"] + vram["live"], vram["view"])
    assert (need.decoder, need.text) == (vram["decoder"], vram["text"])


# --- a card -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "size"), [("wan-1.3b", (480, 272)), ("lumos-1-1b", (448, 256))])
def test_the_largest_history_fits_and_a_frame_more_does_not(model, size):
    request = PlanRequest(model=model, size=size, chunks=900, policy=SlidingWindow())
    for residency, best in answer(request, CARD)["card"]["largest"].items():
        window = parse(best["policy"])
        wider = SlidingWindow(window.frames + 1, window.sink)
        needs = lambda p: memory(
            PlanRequest(model=model, size=size, chunks=900, policy=p, residency=residency)  # noqa: B023
        )["vram"]["total"]
        assert needs(window) == best["needs"] <= CARD.free < needs(wider)


def test_sessions_share_weights_and_activations_and_nothing_else():
    request = PlanRequest(model="wan-1.3b", size=(480, 272), chunks=50, policy=SlidingWindow())
    found = answer(request, CARD)
    vram, count = found["vram"], found["card"]["sessions"]
    each = vram["total"] - vram["weights"] - vram["activations"]
    assert count > 1 and found["card"]["fits"]
    assert vram["weights"] + vram["activations"] + count * each <= CARD.free
    assert vram["weights"] + vram["activations"] + (count + 1) * each > CARD.free


def test_the_longest_take_that_keeps_everything_fits_and_a_longer_one_does_not():
    request = PlanRequest(model="wan-1.3b", chunks=1)
    most = longest(request, CARD, FullHistory())
    needs = lambda n: memory(PlanRequest(model="wan-1.3b", chunks=n, policy=FullHistory()))["vram"]["total"]
    assert most is not None and needs(most) <= CARD.free < needs(most + 1)
    assert longest(request, Room("2GB", 2 * GB), FullHistory()) is None


def test_what_can_i_run_has_a_row_for_every_model_and_size():
    rows = told("--gpu", "24GB")["rows"]
    assert {row["model"] for row in rows} == set(models())
    assert len(rows) == sum(1 + len(shape.sizes) for shape in models().values())
    for row in rows:
        assert row["fits"] == (row["needs"] <= 23 * GB) == (row["lacks"] == 0) and row["fits"] == (row["sessions"] > 0)
        if row["largest"] is not None:
            assert row["largest"]["needs"] <= 23 * GB
    by = {(row["model"], row["width"]): row for row in rows}
    assert by["wan-1.3b", 832]["fits"] and not by["wan-14b", 832]["fits"]
    assert by["wan-14b", 832]["weights"] > 24 * GB and by["wan-14b", 832]["largest"] is None
    assert by["skyreels-v2-1.3b", 480]["full_history_seconds"] is None  # windows have no end
    assert 0 < by["wan-1.3b", 832]["full_history_seconds"] < 60


def test_more_memory_never_runs_less():
    key = lambda row: (row["model"], row["width"])
    small, large = (
        {key(row): row for row in runnable(Room("", size * GB), PlanRequest(model="", chunks=1))} for size in (24, 80)
    )
    assert all(large[at]["sessions"] >= row["sessions"] for at, row in small.items())
    assert sum(row["fits"] for row in large.values()) > sum(row["fits"] for row in small.values())


def test_a_policy_or_size_that_is_not_for_a_model_is_said_in_its_row():
    rows = told("--gpu", "80GB", "--size", "720x720", "-p", "flowcache:chunks=5")["rows"]
    why = {row["model"]: row["why"] for row in rows}
    assert "multiples of 32" in why["lumos-1-3b"] and why["magi-4.5b"] is None
    out = run("--gpu", "80GB", "--size", "720x720").stdout
    assert "needs multiples of 32 pixels" in out


def test_the_table_is_aligned_and_says_what_it_leaves_out():
    out = run("--gpu", "rtx-4090").stdout
    lines = out.splitlines()
    head = next(line for line in lines if line.startswith("model"))
    row = next(line for line in lines if line.startswith("wan-1.3b") and "832x480" in line)
    assert row[head.index("runs") :].startswith("yes") and row[head.index("with") :].startswith("window, resident")
    assert "Arithmetic, nothing was run" in out and "Not counted: the video tokenizer" in out
    assert max(map(len, lines)) < 200


def test_without_json_the_parts_have_lines_in_bytes_and_in_words():
    out = run("-m", "wan-1.3b", "--seconds", "20", "-p", "window", "--gpu", "h100").stdout
    assert "vram:" in out and "  history: " in out and "GB)" in out and "source: nominal: H100" in out


def test_a_policy_is_printed_as_the_command_line_takes_it():
    for policy in (SlidingWindow(), SlidingWindow(9, 1), PackForcing(sink=1, archive_bytes=10**9), FullHistory()):
        assert parse(short(policy)) == policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to plan: name a --model and a length, or a --gpu"),
        ("--gpu nonsense", "no card 'nonsense': give its memory, e.g. 24GB, or one of t4, a10"),
        ("--gpu 24", "--gpu 24: that is 24 B; give a card's memory, e.g. 24GB"),
        ("--gpu 24GB --reserve much", "'much' is no amount of memory"),
        ("-m wan-1.3b --chunks 3 --tflops 0", "--tflops 0: give a finite number above 0"),
        ("-m wan-1.3b --chunks 3 --bandwidth -1", "--bandwidth -1: give a finite number above 0"),
        ("-m wan-1.3b --chunks 3 --roofline missing.json", "missing.json: not readable as JSON"),
        ("-m wan-1.3b --chunks 3 --residency alias", "residency 'alias': use resident or scratch"),
        ("-m wan-1.3b --chunks 3 --dtype float8", "--dtype 'float8': use one of"),
        ("-m wan-1.3b --chunks 3 --history-dtype int4", "--history-dtype 'int4': use one of int8, fp8"),
        ("-m nothing-here --chunks 3", "no model 'nothing-here' to plan for; known: "),
        ("-m src --chunks 3", "src has no longtake.json"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments.split())
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.output


def test_a_file_without_ceilings_is_refused(tmp_path: Path):
    file = tmp_path / "other.json"
    file.write_text('{"schema": 3}')
    with pytest.raises(LongtakeError, match="neither gemm_tflops nor copy_gbs"):
        ceilings(roofline=file)


# --- documents --------------------------------------------------------------------------------------------------------


def test_the_memory_that_the_readme_names_is_what_its_command_says():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    start = text.index("Memory this needs:")
    paragraph = " ".join(text[start : text.index("\n\n", start)].split())
    _, _, rest = paragraph.partition("`longtake plan ")
    command = rest.partition("`")[0].split()
    found, resident = told(*command), told(*command, "--residency", "resident")["vram"]
    vram = found["vram"]
    figures = [
        vram["total"], vram["weights"], vram["history"] + vram["live"], vram["view"], vram["text"], vram["decoder"],
        vram["activations"], resident["view"], resident["total"], found["host_ram"]["text_encoder"],
    ]  # fmt: skip
    assert vram["activations"] == found["activation_peaks"]["decode"]
    converting, *named = re.findall(r"[\d.]+ [GM]B", paragraph)
    assert converting == "2.7 GB", "of memory that was watched, which no plan knows"
    assert named == [bytes_text(figure) for figure in figures]


# --- long takes -------------------------------------------------------------------------------------------------------


class Everything(FullHistory):
    """Full history that is walked table by table."""


@pytest.mark.parametrize("model", ["wan-1.3b", "lumos-1-3b", "magi-4.5b"])
def test_full_history_is_counted_without_its_tables_as_with_them(model):
    one, other = (answer(PlanRequest(model=model, chunks=12, policy=kind())) for kind in (FullHistory, Everything))
    assert one == other


def test_a_take_too_long_to_count_is_refused():
    assert told("-m", "wan-1.3b", "--seconds", "3600", "-p", "window")["chunks"] == 4801
    for length in ("--seconds=86401", "--frames=2000001", "--chunks=100001", "--chunks=1000000000000"):
        result = run("-m", "wan-1.3b", length)
        assert result.exit_code == 2 and "give at most" in result.output
