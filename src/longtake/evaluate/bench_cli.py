"""`longtake bench …`: the benchmarks on the command line. Imports nothing heavy before a benchmark runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LongtakeError

HELP = "Measure, with provenance: figures as JSON and PNG."


def take(
    shape: Annotated[str, typer.Option(help="cpu-small, gpu-wan-1.3b, or cpu-micro to try it.")] = "cpu-small",
    chunks: Annotated[int, typer.Option(help="Length of the take.")] = 300,
    pairs: Annotated[int, typer.Option(help="Alternating replays of the early and the late snapshot.")] = 30,
    out: Annotated[Path, typer.Option(help="Folder for take-DEVICE.json and .png.")] = Path("benchmarks"),
    force: Annotated[bool, typer.Option("--force", help="Measure on a busy machine; the result is marked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the shape's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default the shape's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default torch's choice.")] = None,
) -> None:
    """Does a long take stay flat? Time, memory and operations of an early and a late chunk, and the cost of everything
    beside the model's forwards."""
    main(
        shape, chunks=chunks, pairs=pairs, out=out, force=force, as_json=as_json, device=device, dtype=dtype,
        threads=threads,
    )  # fmt: skip


def packcache(
    shape: Annotated[
        str, typer.Option(help="lumos-cpu, lumos-1-1b or lumos-1-3b (CUDA), or lumos-micro to try it.")
    ] = "lumos-cpu",
    frames: Annotated[str, typer.Option(help="Pixel frames to answer for, separated by commas.")] = "24,48,96,192",
    policy: Annotated[str, typer.Option("--policy", "-p", help="The packed history.")] = "packcache",
    baseline: Annotated[
        list[str] | None, typer.Option(help="mask-free or authors-like; may be repeated.", show_default="both")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps per latent frame; default the shape's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for packcache-DEVICE.json and .png.")] = Path("benchmarks"),
    force: Annotated[bool, typer.Option("--force", help="Measure on a busy machine; the result is marked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the shape's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default the shape's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default torch's choice.")] = None,
) -> None:
    """What a packed history saves on Lumos-1, against two ways of keeping all of it: mask-free, and as its authors
    run it."""
    try:
        lengths = [int(n) for n in frames.split(",")]
    except ValueError:
        raise LongtakeError(f"--frames {frames!r}: give whole numbers separated by commas, e.g. 24,48") from None
    if out.exists() and not out.is_dir():
        raise LongtakeError(f"{out} is not a folder: give --out a folder, it is made if it is not there")

    from ..policies import parse
    from .bench_packcache import BASELINES, run

    _hush()
    with _bars() as progress:
        report = run(
            shape, frames=lengths, policy=parse(policy), baselines=baseline or BASELINES, steps=steps, device=device,
            dtype=dtype, threads=threads, force=force, command=shlex.join(["longtake", *sys.argv[1:]]),
            progress=progress,
        )  # fmt: skip
    written = report.write(out, f"packcache-{report.settings['device'].partition(':')[0]}")
    typer.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report.text())
    typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)


def packforcing(
    shape: Annotated[str, typer.Option(help="cpu-small, gpu-wan-1.3b, or cpu-micro to try it.")] = "cpu-small",
    chunk: Annotated[int | None, typer.Option(help="Latent frames of a chunk; default the shape's own.")] = None,
    chunks: Annotated[int, typer.Option(help="Length of the take; two minutes of Wan in chunks of 4 are 121.")] = 60,
    full_chunks: Annotated[int, typer.Option(help="How far full history is followed beside it.")] = 20,
    policy: Annotated[str, typer.Option("--policy", "-p", help="packforcing, with options.")] = "packforcing",
    residency: Annotated[str, typer.Option(help="Where the view lives: resident or scratch.")] = "scratch",
    decode: Annotated[
        bool | None, typer.Option("--decode/--no-decode", help="Decode the frames; default on a GPU.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for packforcing-DEVICE.json and .png.")] = Path("benchmarks"),
    force: Annotated[bool, typer.Option("--force", help="Measure on a busy machine; the result is marked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the shape's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default the shape's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default torch's choice.")] = None,
) -> None:
    """What a compressed, chosen middle costs and saves: shares of a chunk's time, the score against the double sum, and
    time and tokens against full history and the window of the same bytes."""
    if out.exists() and not out.is_dir():
        raise LongtakeError(f"{out} is not a folder: give --out a folder, it is made if it is not there")

    from ..policies import PackForcing, parse
    from .bench_packforcing import run

    asked = parse(policy)
    if not isinstance(asked, PackForcing):
        raise LongtakeError(f"--policy {policy}: this measures packforcing, give packforcing[:key=value,…]")
    _hush()
    with _bars() as progress:
        report = run(
            shape, chunk=chunk, chunks=chunks, full_chunks=full_chunks, policy=asked, residency=residency,
            decode=decode, device=device, dtype=dtype, threads=threads, force=force,
            command=shlex.join(["longtake", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    written = report.write(out, f"packforcing-{report.settings['device'].partition(':')[0]}")
    typer.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report.text())
    typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)


def flowcache_kv(
    shape: Annotated[str, typer.Option(help="magi-4.5b, or micro to try it.")] = "magi-4.5b",
    pairs: Annotated[int, typer.Option(help="Alternating measurements of the two ways.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for flowcache-kv-DEVICE.json.")] = Path("benchmarks"),
    force: Annotated[bool, typer.Option("--force", help="Measure on a busy machine; the result is marked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default torch's choice.")] = None,
) -> None:
    """What compressing one full-size layer takes: FlowCacheKV's score against whole matrices per head."""
    if out.exists() and not out.is_dir():
        raise LongtakeError(f"{out} is not a folder: give --out a folder, it is made if it is not there")

    from .bench_flowcache_kv import run

    with _bars() as progress:
        report = run(
            shape, pairs=pairs, device=device, dtype=dtype, threads=threads, force=force,
            command=shlex.join(["longtake", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    written = report.write(out, f"flowcache-kv-{report.settings['device'].partition(':')[0]}")
    typer.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report.text())
    typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)


def table(
    report: Annotated[Path, typer.Argument(help="A JSON that `bench take` wrote.")] = Path("benchmarks/take-cpu.json"),
    into: Annotated[Path | None, typer.Option(help="A document to fill between its marks, e.g. README.md.")] = None,
) -> None:
    """The figures of a benchmark as a Markdown table: printed, or filled into a document."""
    from .bench_report import TakeReport, fill
    from .provenance import write_atomically

    text = TakeReport.read(report).markdown()
    if into is None:
        typer.echo(text)
        return
    try:
        document = into.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LongtakeError(f"{into} cannot be read: {error}") from error
    write_atomically(into, fill(document, text).encode())


def main(
    shape: str = "cpu-small", *, chunks: int = 300, pairs: int = 30, out: Path = Path("benchmarks"),
    force: bool = False, as_json: bool = False, device: str | None = None, dtype: str | None = None,
    threads: int | None = None,
) -> None:  # fmt: skip
    """Run, write `take-DEVICE.json` and `.png` into `out`, and print the figures. Raises LongtakeError."""
    from .bench_take import run

    _hush()

    if out.exists() and not out.is_dir():
        raise LongtakeError(f"{out} is not a folder: give --out a folder, it is made if it is not there")
    with _bars() as progress:
        report = run(
            shape, chunks=chunks, pairs=pairs, device=device, dtype=dtype, threads=threads, force=force,
            command=shlex.join(["longtake", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    written = report.write(out, f"take-{report.settings['device'].partition(':')[0]}")
    typer.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report.text())
    typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a benchmark, on stderr: call it with stage, done, of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        tasks: dict[str, object] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield progress


def _hush() -> None:
    """No progress bars of the library that reads weights: they would break ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
