"""`longtake batch`: a file of takes, each made exactly once, in this process or on a Ray cluster."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from ..errors import LongtakeError
from . import options, shell

if TYPE_CHECKING:
    from ..cluster.batch import Outcome


def batch(
    prompts: Annotated[
        Path,
        Argument(
            metavar="PROMPTS.jsonl",
            help="A JSON object per line: prompt, and what is wanted of seed, model, policy, reuse, seconds or chunks, "
            "size, steps, guidance, negative, image, switch, switch_mode, id.",
        ),
    ],
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Gets takes/NAME/take.mp4 and take.json, and results.jsonl.")
    ],
    model: options.Model = None,
    policy: options.Policy = None,
    reuse: Annotated[
        str | None, Option(metavar="SPEC", help="As for `longtake generate`.", show_default="none")
    ] = None,
    seconds: options.Seconds = None,
    chunks: options.Chunks = None,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    ray: Annotated[bool, Option("--ray", help="On a Ray of its own, on loopback, which ends with the batch.")] = False,
    ray_address: options.RayAddress = None,
    workers: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Make every take of a file that is not in DIR yet. The options say what the lines leave out.

    Run it again after Ctrl-C, a crash or a kill: what is there is kept, and nothing is made twice. Lines that are wrong
    as they stand are told all at once, with their numbers, before anything is made (exit code 2). A line that fails
    does not stop the others; the exit code is then 1.
    """
    if seconds is not None and chunks is not None:
        raise LongtakeError("--seconds and --chunks: give one of them")
    shell.check_choice(dtype, "--dtype", options.DTYPES)
    shell.check_threads(threads)

    if workers is not None and not (ray or ray_address):
        raise LongtakeError("--workers is for Ray: add --ray, or --ray-address")

    from ..cluster import batch as batches
    from ..cluster.checking import check
    from ..cluster.connecting import connected, slots
    from ..cluster.farm import Farm
    from ..cluster.jobs import read_lines
    from ..cluster.making import Maker

    defaults = {"model": model, "policy": policy, "reuse": reuse, "seconds": seconds, "chunks": chunks, "size": size}
    lines = read_lines(prompts, defaults)
    check(lines, prompts, output)
    done = 0

    def told(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        shell.say(f"{done}/{len(lines)} {text(outcome)}")

    with contextlib.ExitStack() as around:
        runner: batches.Runner
        if ray or ray_address:
            connection = around.enter_context(connected(ray_address))
            count, share = slots(connection, workers, device, threads)
            shell.say(f"{count} worker{'s' if count > 1 else ''} on Ray")
            runner = Farm(connection, count, share, {"device": device, "dtype": dtype, "threads": threads})
        else:
            shell.check_device(device)
            shell.hush()
            runner = batches.Here(Maker(device, dtype, threads))
        stop = around.enter_context(shell.StopAsked())
        outcomes = batches.run(lines, output, runner, lambda: not stop.asked, told)
    counts = {status: sum(o.status == status for o in outcomes) for status in batches.STATUSES}
    new = [outcome for outcome in outcomes if outcome.status == "made"]
    video, work = sum(o.video_seconds or 0 for o in new), sum(o.seconds or 0 for o in new)
    report = {
        "output": str(output), **counts, "video_seconds": video, "work_seconds": work,
        "lines": [outcome.row() for outcome in outcomes],
    }  # fmt: skip
    listed = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    shell.answer(report, f"{output}: {listed}; {video:.2f} s of video in {work:.2f} s of work", as_json)
    if stop.asked:
        raise typer.Exit(stop.exit_code)
    if counts["failed"] or counts["wrong"]:
        raise typer.Exit(shell.FAILED)


def text(outcome: Outcome) -> str:
    """A line's end, for people."""
    words = {"made": "made", "kept": "is there already", "stopped": "was not come to"}
    if outcome.status in words:
        return f"line {outcome.line} {words[outcome.status]}: {outcome.name}"
    return f"line {outcome.line} {outcome.status}: {outcome.problem}"
