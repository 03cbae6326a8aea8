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
from typer.core import TyperGroup

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


class Suite(Commands):
    """A group that answers with what it has when nothing is asked of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return TyperGroup.parse_args(self, ctx, args)


bench = typer.Typer(cls=Suite, invoke_without_command=True, help="Measure, with provenance: figures as JSON and PNG.")


@bench.callback()
def suite(ctx: typer.Context) -> None:
    """Measure, with provenance: figures as JSON and PNG. Without a name: the suite, and how long each takes."""
    if ctx.invoked_subcommand is None:
        from ..evaluate.bench_suite import listing

        typer.echo(listing())


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


@bench.command("endless")
@shell.guarded
def endless(
    model: Annotated[str, Option("--model", "-m", help="A trained model: an embedded one, or a folder.")] = "tiny-wan",
    policy: Annotated[
        list[str] | None,
        Option("--policy", "-p", help="What of the past is kept; may be repeated.", show_default="packforcing"),
    ] = None,
    shape: Annotated[str, Option(help="long, or micro to try it: what is not given below.")] = "long",
    latent_frames: Annotated[
        int | None, Option(help="Length of a take, rounded up to whole chunks.", show_default="2001")
    ] = None,
    seeds: Annotated[int | None, Option(help="Takes of every policy.", show_default="3")] = None,
    pairs: Annotated[
        int | None,
        Option(help="Alternating replays of the early and the late snapshot, for each take.", show_default="10"),
    ] = None,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False,
    device: Annotated[str | None, Option(help="cpu or cuda; default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default bfloat16 on a GPU.")] = None,
    threads: Annotated[int | None, Option(help="CPU threads; default one for an embedded model.")] = None,
) -> None:  # fmt: skip
    """What becomes of a take of thousands of latent frames of a trained model: live memory, time late against early,
    slopes of light, and whether anything still moves by its law."""
    shell.check_folder(out)

    from ..evaluate.bench_endless import MODEL, POLICIES, run

    name = "endless" if model == MODEL else f"endless-{Path(model).name}"
    _measure(
        run, name, out, as_json,
        shape=shape, model=model, policies=policy or POLICIES, latent_frames=latent_frames, seeds=seeds, pairs=pairs,
        device=device, dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("packcache")
@shell.guarded
def packcache(
    shape: Annotated[
        str | None,
        Option(
            help="lumos-cpu, lumos-1-1b or lumos-1-3b (CUDA), or lumos-micro to try it.",
            show_default="lumos-cpu, with --device cuda lumos-1-1b",
        ),
    ] = None,
    frames: Annotated[str, Option(help="Pixel frames to answer for, separated by commas.")] = "24,48,96,192",
    policy: Annotated[str, Option("--policy", "-p", help="The packed history.")] = "packcache",
    baseline: Annotated[
        list[str] | None, Option(help="mask-free or authors-like; may be repeated.", show_default="both")
    ] = None,
    steps: Annotated[
        int | None,
        Option(
            help="Steps per latent frame; default the shape's own, 5 on a CPU and the published 50 on CUDA. Ratios "
            "hardly depend on it, time does: 4 are plenty for lumos-1-1b and lumos-1-3b."
        ),
    ] = None,
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


@bench.command("flowcache")
@shell.guarded
def flowcache(
    shape: Annotated[str, Option(help="cpu-sky, gpu-skyreels-1.3b, or cpu-micro to try it.")] = "cpu-sky",
    model: Annotated[
        str, Option(help="A SkyReels-V2 model of the world of lanes, to judge takes by; none: the shape alone.")
    ] = "tiny-skyreels",
    rounds: Annotated[int, Option(help="Takes of every arm that are timed; 0 times nothing.")] = 5,
    seeds: Annotated[int, Option(help="Seeds whose takes are judged; 0 judges nothing.")] = 16,
    judged: Annotated[
        Path | None,
        Option(metavar="FILE", help="Take the judgement over from a report of --rounds 0: it needs no idle machine."),
    ] = None,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """What reuse and a compressed past save on diffusion forcing, against diffusers' own pipeline and no reuse; and
    what they change in takes from the same noise."""
    shell.check_folder(out)

    from ..evaluate.bench_flowcache import run
    from ..evaluate.flowcache_report import FlowCacheReport

    _measure(
        run, "flowcache", out, as_json,
        shape=shape, model=None if model == "none" else model, rounds=rounds, seeds=seeds, device=device, dtype=dtype,
        threads=threads, force=force, judged=None if judged is None else FlowCacheReport.read(judged),
    )  # fmt: skip


@bench.command("flowcache-kv")
@shell.guarded
def flowcache_kv(
    shape: Annotated[str, Option(help="magi-4.5b, or micro to try it.")] = "magi-4.5b",
    pairs: Annotated[
        int, Option(help="Runs of the way with whole matrices (most of the time), each between two of FlowCacheKV's.")
    ] = 2,
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


@bench.command("gpu")
@shell.guarded
def gpu(
    shape: Annotated[str, Option(help="published, or micro to try it on any machine.")] = "published",
    minutes: Annotated[float, Option(help="For everything; what is not reached is said to be missing.")] = 10.0,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False,
    device: Annotated[str | None, Option(help="cpu or cuda; default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default bfloat16 on a GPU.")] = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """What Lumos-1 3B, Wan 1.3B, SkyReels-V2 1.3B and MAGI-1 4.5B take on one GPU, with random weights: every distinct
    forward, takes summed from them, whole chunks; kernels, CUDA graphs, and the error of quantised history."""
    shell.check_folder(out)

    from ..evaluate.gpu.bench import run

    _measure(
        run, "gpu", out, as_json,
        shape=shape, minutes=minutes, device=device, dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("roofline")
@shell.guarded
def roofline(
    shape: Annotated[str, Option(help="default, or micro to try it.")] = "default",
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False,
    device: Annotated[str | None, Option(help="cpu or cuda; default a GPU if there is one.")] = None,
    dtype: Annotated[
        list[str] | None, Option(help="Of the products; may be repeated.", show_default="float32 and bfloat16")
    ] = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """This machine's ceilings: TFLOP/s of matrix products by dtype, and GB/s of copies."""
    shell.check_folder(out)

    from ..evaluate.bench_roofline import run

    _measure(
        run, "roofline", out, as_json,
        shape=shape, dtypes=dtype or ("float32", "bfloat16"), device=device, threads=threads, force=force,
    )  # fmt: skip


@bench.command("peers")
@shell.guarded
def peers(
    shape: WanShape = "cpu-small",
    peer: Annotated[
        list[str] | None,
        Option(
            help="growing, shifted, anyflow, anyflow-sdpa, skyreels or scoring; may be repeated.", show_default="all"
        ),
    ] = None,
    match: Annotated[str, Option(help="What is made equal: tokens or bytes.")] = "tokens",
    policy: Annotated[
        str | None,
        Option("--policy", "-p", help="What is fitted to the peer's bytes.", show_default="the shape's window"),
    ] = None,
    chunks: Annotated[int, Option(help="Length of the takes.")] = 20,
    repeats: Annotated[int, Option(help="How often both sides run, in turn.")] = 5,
    out: Out = FOLDER, force: Force = False, as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """Ours beside other people's caches, in one process, in turn: torch.cat, a shifted window, diffusers' AnyFlow-FAR
    and asynchronous SkyReels-V2, whole-matrix scores."""
    shell.check_folder(out)

    from ..evaluate.bench_peers import run
    from ..policies import parse

    name = "peers" if match == "tokens" else f"peers-{match}"
    _measure(
        run, name, out, as_json,
        shape=shape, peers=peer, match=match, policy=None if policy is None else parse(policy), chunks=chunks,
        repeats=repeats, device=device, dtype=dtype, threads=threads, force=force,
    )  # fmt: skip


@bench.command("table")
@shell.guarded
def table(
    report: Annotated[
        list[Path] | None, typer.Argument(help="JSON files that benchmarks wrote.", show_default="all of --from")
    ] = None,
    into: Annotated[
        list[Path] | None,
        Option(help="A document whose blocks <!-- bench:NAME --> are filled, e.g. README.md; may be repeated."),
    ] = None,
    folder: Annotated[Path, Option("--from", metavar="DIR", help="Folder of the reports.")] = FOLDER,
) -> None:
    """The figures of benchmarks and comparisons as Markdown tables: printed, or filled into documents."""
    from ..evaluate import bench_suite
    from ..evaluate.provenance import write_atomically

    given = {path.stem: bench_suite.read(path) for path in report or ()}
    if into is None:
        found = given or {path.stem: bench_suite.read(path) for path in sorted(folder.glob("*.json"))}
        if not found:
            raise LongtakeError(f"{folder} holds no report: give --from DIR, or a benchmark's JSON")
        typer.echo("\n\n".join(one.markdown() for one in found.values()))
        return
    named = given | {one.kind: one for one in given.values()}
    for path in into:
        try:
            document = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LongtakeError(f"{path} cannot be read: {error}") from error
        write_atomically(path, bench_suite.fill(document, folder, named).encode())
    shell.say_written(into)


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
