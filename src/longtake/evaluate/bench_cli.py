"""`longtake bench …`: the benchmarks on the command line. Imports nothing heavy before a benchmark runs."""

from __future__ import annotations

import json
import shlex
import sys
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .bench_take import run

    _hush()

    if out.exists() and not out.is_dir():
        raise LongtakeError(f"{out} is not a folder: give --out a folder, it is made if it is not there")
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        tasks: dict[str, object] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        report = run(
            shape, chunks=chunks, pairs=pairs, device=device, dtype=dtype, threads=threads, force=force,
            command=shlex.join(["longtake", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    written = report.write(out, f"take-{report.settings['device'].partition(':')[0]}")
    typer.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report.text())
    typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)


def _hush() -> None:
    """No progress bars of the library that reads weights: they would break ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
