"""`longtake bench …`: the benchmarks on the command line. Imports nothing heavy before a benchmark runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ..errors import LongtakeError
from . import shell
from .usage import Commands

Out = Annotated[Path, Option(metavar="DIR", help="Folder for NAME-DEVICE.json and .png.")]
Force = Annotated[bool, Option("--force", help="Measure on a busy machine; the result is marked.")]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, Option(help="cpu or cuda; default the shape's own.")]
Dtype = Annotated[str | None, Option(help="float32, bfloat16 or float16; default the shape's own.")]
Threads = Annotated[int | None, Option(help="CPU threads; default torch's choice.")]
WanShape = Annotated[str, Option(help="cpu-small, gpu-wan-1.3b, or cpu-micro to try it.")]
FOLDER = Path("benchmarks")

bench = typer.Typer(cls=Commands, help="Measure, with provenance: figures as JSON and PNG.")


@bench.command("take")
@shell.guarded
def take(
    shape: WanShape = "cpu-small",
    chunks: Annotated[int, Option(help="Length of the take.")] = 300,
    pairs: Annotated[int, Option(help="Alternating replays of the early and the late snapshot.")] = 30,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """Does a long take stay flat? Time, memory and operations of an early and a late chunk, and the cost of everything
    beside the model's forwards."""
    shell.check_folder(out)

    from ..evaluate.bench_take import run

    _measure(
        run, "take", out, as_json,
        shape=shape, chunks=chunks, pairs=pairs, device=device, dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("packcache")
@shell.guarded
def packcache(
    shape: Annotated[
        str, Option(help="lumos-cpu, lumos-1-1b or lumos-1-3b (CUDA), or lumos-micro to try it.")
    ] = "lumos-cpu",
    frames: Annotated[str, Option(help="Pixel frames to answer for, separated by commas.")] = "24,48,96,192",
    policy: Annotated[str, Option("--policy", "-p", help="The packed history.")] = "packcache",
    baseline: Annotated[
        list[str] | None, Option(help="mask-free or authors-like; may be repeated.", show_default="both")
    ] = None,
    steps: Annotated[int | None, Option(help="Steps per latent frame; default the shape's own.")] = None,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """What a packed history saves on Lumos-1, against two ways of keeping all of it: mask-free, and as its authors
    run it."""
    try:
        lengths = [int(n) for n in frames.split(",")]
    except ValueError:
        raise LongtakeError(f"--frames {frames!r}: give whole numbers separated by commas, e.g. 24,48") from None
    shell.check_folder(out)

    from ..evaluate.bench_packcache import BASELINES, run
    from ..policies import parse

    _measure(
        run, "packcache", out, as_json,
        shape=shape, frames=lengths, policy=parse(policy), baselines=baseline or BASELINES, steps=steps, device=device,
        dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("packforcing")
@shell.guarded
def packforcing(
    shape: WanShape = "cpu-small",
    chunk: Annotated[int | None, Option(help="Latent frames of a chunk; default the shape's own.")] = None,
    chunks: Annotated[int, Option(help="Length of the take; two minutes of Wan in chunks of 4 are 121.")] = 60,
    full_chunks: Annotated[int, Option(help="How far full history is followed beside it.")] = 20,
    policy: Annotated[str, Option("--policy", "-p", help="packforcing, with options.")] = "packforcing",
    residency: Annotated[str, Option(help="Where the view lives: resident or scratch.")] = "scratch",
    decode: Annotated[bool | None, Option("--decode/--no-decode", help="Decode the frames; default on a GPU.")] = None,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """What a compressed, chosen middle costs and saves: shares of a chunk's time, the score against the double sum, and
    time and tokens against full history and the window of the same bytes."""
    shell.check_folder(out)

    from ..evaluate.bench_packforcing import run
    from ..policies import PackForcing, parse

    asked = parse(policy)
    if not isinstance(asked, PackForcing):
        raise LongtakeError(f"--policy {policy}: this measures packforcing, give packforcing[:key=value,…]")
    _measure(
        run, "packforcing", out, as_json,
        shape=shape, chunk=chunk, chunks=chunks, full_chunks=full_chunks, policy=asked, residency=residency,
        decode=decode, device=device, dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("flowcache-kv")
@shell.guarded
def flowcache_kv(
    shape: Annotated[str, Option(help="magi-4.5b, or micro to try it.")] = "magi-4.5b",
    pairs: Annotated[int, Option(help="Alternating measurements of the two ways.")] = 5,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False,
    device: Annotated[str | None, Option(help="cpu or cuda; default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default bfloat16.")] = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """What compressing one full-size layer takes: FlowCacheKV's score against whole matrices per head."""
    shell.check_folder(out)

    from ..evaluate.bench_flowcache_kv import run

    _measure(
        run, "flowcache-kv", out, as_json,
        shape=shape, pairs=pairs, device=device, dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("table")
@shell.guarded
def table(
    report: Annotated[Path, typer.Argument(help="A JSON that `bench take` wrote.")] = FOLDER / "take-cpu.json",
    into: Annotated[Path | None, Option(help="A document to fill between its marks, e.g. README.md.")] = None,
) -> None:
    """The figures of a benchmark as a Markdown table: printed, or filled into a document."""
    from ..evaluate.bench_report import TakeReport, fill
    from ..evaluate.provenance import write_atomically

    text = TakeReport.read(report).markdown()
    if into is None:
        typer.echo(text)
        return
    try:
        document = into.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LongtakeError(f"{into} cannot be read: {error}") from error
    write_atomically(into, fill(document, text).encode())


def _measure(run: Callable[..., Any], name: str, out: Path, as_json: bool, **asked: Any) -> None:
    """Run a benchmark as asked, write its report into `out` and answer with it. Raises LongtakeError."""
    shell.hush()
    with _bars() as progress:
        report = run(**asked, command=shlex.join(["longtake", *sys.argv[1:]]), progress=progress)
    written = report.write(out, f"{name}-{report.settings['device'].partition(':')[0]}")
    shell.answer(report.as_dict(), report.text(), as_json)
    shell.say_written(written)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a benchmark, on stderr: call it with stage, done, of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield progress
