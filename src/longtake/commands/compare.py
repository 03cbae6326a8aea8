"""`longtake compare`: policies against each other, on a world whose truth is known; or a matrix of free takes."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LongtakeError
from . import options, shell
from .progress import CountProgress

if TYPE_CHECKING:
    from ..evaluate.compare.executor import Executor
    from ..evaluate.compare.matrix import Matrix
    from ..evaluate.compare.runner import Plan

FEWEST, MOST = 12, 400  # true latent frames
SCHEMA = 2  # of summary.json
SCENES = 32  # of every arm on the world
WORLD_ONLY = ("protocol", "frames", "free", "gap", "compressor", "against", "as_given")
TAKES_ONLY = ("prompt", "seconds", "chunks", "reuse", "size", "steps", "guidance", "negative")


def compare(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for cells, summary.json and report.html.")
    ],
    matrix: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MATRIX.yaml]",
            help="What to compare, instead of options: free takes (models × policies × reuse × prompts × seeds × "
            "lengths), or with protocols the procedural world.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="NAME|DIR", help="Model, for --protocol trained on the world; repeatable.",
            show_default=f"every embedded one that was; for free takes {options.DEFAULT_MODEL}",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", "-p", metavar="NAME[:KEY=VALUE,…]|FILE.py:CLASS", help="KV policy; repeatable.",
            show_default="every policy that has a name; for free takes the model's own",
        ),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            "--budget", metavar="N", help="History budget, in latent frames of full K/V; repeatable.",
            show_default="about a third, two thirds and all of a training clip, with the chunk in flight; for free "
            "takes none",
        ),
    ] = None,
    as_given: Annotated[
        bool, typer.Option("--as-given", help="Policies as they are written, not fitted to a budget.")
    ] = False,
    compressor: Annotated[
        list[str] | None,
        typer.Option(
            "--compressor", metavar="NAME|DIR|own", show_default="own",
            help="What compresses under policies that have compressed blocks: the model's own, or another; repeatable.",
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", metavar="A|B|L", help="A, B, L, or several (repeat it).", show_default="A"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="POLICY",
            help="One of the policies compared, as given: the paired difference of all others from it, in a column.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds", metavar="N", help="Scenes of every arm; or seeds of every prompt.",
            show_default=f"{SCENES}; for free takes 1",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", metavar="N", help=f"True latent frames committed, {FEWEST} to {MOST}.", show_default="120"
        ),
    ] = None,
    free: Annotated[
        int | None,
        typer.Option(
            "--free", metavar="N", help="Protocol B: latent frames of the free run.", show_default="504"
        ),
    ] = None,
    gap: Annotated[
        list[int] | None,
        typer.Option(
            "--gap", metavar="N", help="Latent frames for which an actor may be hidden; repeatable.",
            show_default="1, 2, 4 … 64",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Free takes: what to see; repeatable."),
    ] = None,
    seconds: Annotated[
        list[float] | None,
        typer.Option("--seconds", metavar="S", help="Free takes: length, rounded up to whole chunks; repeatable."),
    ] = None,
    chunks: Annotated[
        list[int] | None, typer.Option("--chunks", metavar="N", help="Free takes: length in chunks; repeatable.")
    ] = None,
    reuse: Annotated[
        list[str] | None,
        typer.Option(
            "--reuse", metavar="SPEC", show_default="none",
            help="Free takes: none, flowcache:slow, … as for `longtake generate`; repeatable. Others are measured "
            "against none.",
        ),
    ] = None,
    size: options.Size = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    export_vbench: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Free takes: also write the videos to DIR as VBench reads them."),
    ] = None,
    import_vbench: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Take over a results file of VBench for exported videos; repeatable."),
    ] = None,
    export_lpips: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write pairs for LPIPS to DIR, with the script that scores them."),
    ] = None,
    import_lpips: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take over the lpips.json that the script wrote.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="N", help="Processes, one thread each.",
            show_default="1; on Ray one per GPU, else one per CPU",
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="On a Ray of its own, on loopback, which ends with the comparison.")
    ] = False,
    ray_address: options.RayAddress = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Compare KV policies at equal budgets on the procedural world, with controls; or, given a matrix or prompts, free
    takes of any model. Resumable: finished cells stand in DIR/cells and are never made again.
    """
    given: dict[str, Any] = {
        "protocol": protocol, "frames": frames, "free": free, "gap": gap, "prompt": prompt, "seconds": seconds,
        "chunks": chunks, "reuse": reuse, "size": size, "steps": steps, "guidance": guidance, "negative": negative,
        "model": model, "policy": policy, "budget": budget, "seeds": seeds, "compressor": compressor,
        "against": against, "as_given": as_given or None,
    }  # fmt: skip
    from ..evaluate.compare.matrix import read_matrix

    written: Matrix | None = None
    if matrix is not None:
        if beside := _named(given, given):
            raise LongtakeError(f"{beside[0]} beside {matrix}: the matrix says it all; write it there, or leave it out")
        found = read_matrix(matrix)
        if isinstance(found, dict):
            given |= found
        else:
            written = found
    takes = written is not None or bool(prompt)
    _check(given, takes)
    exchange = (export_vbench, import_vbench, export_lpips, import_lpips)
    if not takes and any(exchange):
        raise LongtakeError("VBench and LPIPS are for free takes: give the matrix or the prompts of their comparison")
    if workers is not None and workers < 1:
        raise LongtakeError(f"--workers {workers}: give at least 1")

    from ..evaluate.compare import adapters
    from ..evaluate.compare.cells import Store
    from ..evaluate.compare.runner import cells, execute, origin
    from ..evaluate.compare.summary import made_by, summarise
    from ..evaluate.compare.take_tables import take_tables
    from ..evaluate.metrics import DEFINITIONS
    from ..evaluate.provenance import write_atomically
    from ..evaluate.report import page

    shell.check_device(device)
    adapters.check_files(import_vbench or (), import_lpips)
    shell.hush()
    plan = _plan_of_takes(given, written, device) if takes else _plan_of_world(given, device)
    notes: list[str] = []
    todo = cells(plan, notes)
    known, against = dict.fromkeys(cell.arm.name for cell in todo if not cell.arm.control), given["against"]
    if against is not None and against not in known:
        raise LongtakeError(f"--against {against}: none of the policies compared, which are {', '.join(known)}")
    store = Store(out)
    with contextlib.ExitStack() as around:
        executor = None
        if ray or ray_address:
            executor = _on_ray(around, ray_address, workers, device, out, plan.classes)
        advance = around.enter_context(CountProgress("comparing"))
        notes += execute(plan, todo, store, out, workers or 1, advance, shell.hush, executor)
    done: list[str] = []
    if takes:
        for file in import_vbench or ():
            done.append(f"VBench scores of {adapters.import_vbench(file, todo, store)} takes from {file}")
        if import_lpips is not None:
            done.append(f"LPIPS of {adapters.import_lpips(import_lpips, todo, store)} takes from {import_lpips}")
        if export_vbench is not None:
            done.append(f"{adapters.export_vbench(todo, store, export_vbench)} videos for VBench in {export_vbench}")
        if export_lpips is not None:
            done.append(f"{adapters.export_lpips(todo, store, export_lpips)} pairs for LPIPS in {export_lpips}")
    contents = store.finished(todo)
    summary: dict[str, Any] = {
        "schema": SCHEMA, "command": shlex.join(["longtake", *sys.argv[1:]]), "notes": notes, "cells": len(todo),
        "finished": sum(cell.key in contents for cell in todo), "origin": origin(plan),
        "made_by": made_by(contents[cell.key] for cell in todo if cell.key in contents),
    }  # fmt: skip
    if takes:
        summary |= {
            "tables": [], "takes": take_tables(todo, store, contents),
            "definitions": {name: told.as_dict() for name, told in DEFINITIONS.items()},
        }  # fmt: skip
    else:
        from ..evaluate.compare.runner import training_frames

        summary |= summarise(todo, contents, training_frames(plan), against)
    write_atomically(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / "report.html", page(summary, out).encode())
    tables = len(summary["tables"]) + len(summary.get("takes", ()))
    text = f"{out / 'report.html'}: {summary['finished']} of {len(todo)} cells, {tables} tables"
    for note in notes:
        shell.say(note)
    shell.answer(summary, "\n".join([text, *done]), as_json)


def _on_ray(
    around: contextlib.ExitStack, address: str | None, workers: int | None, device: str | None, out: Path,
    classes: tuple[tuple[str, ...], tuple[str, ...]],
) -> Executor:  # fmt: skip
    """What runs the work on Ray, connected until `around` ends."""
    from ..cluster.comparing import OnRay
    from ..cluster.connecting import connected, slots

    connection = around.enter_context(connected(address))
    count, share = slots(connection, workers, device, 1)
    shell.say(f"{count} worker{'s' if count > 1 else ''} on Ray")
    return OnRay(connection, count, share, out, classes, shell.hush)


def _named(given: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the options that were given."""
    return [f"--{name.replace('_', '-')}" for name in names if given[name] not in (None, [])]


def _check(given: dict[str, Any], takes: bool) -> None:
    """Raise LongtakeError for options that do not go together, and for values out of range."""
    if takes and (beside := _named(given, WORLD_ONLY)):
        raise LongtakeError(f"{beside[0]} is for the procedural world, --prompt for free takes: give one of them")
    if not takes and (beside := _named(given, TAKES_ONLY)):
        raise LongtakeError(f"{beside[0]} is for free takes: give --prompt too, or a matrix")
    if given["frames"] is not None and not FEWEST <= given["frames"] <= MOST:
        raise LongtakeError(f"--frames {given['frames']}: give {FEWEST} to {MOST} latent frames")
    if given["as_given"] and given["budget"]:
        raise LongtakeError("--as-given beside --budget: policies are fitted to a budget, or they are not")
    if given["free"] is not None and given["free"] < 6:
        raise LongtakeError(f"--free {given['free']}: give at least 6 latent frames")
    if unknown := sorted(set(given["protocol"] or ()) - {"A", "B", "L"}):
        raise LongtakeError(f"--protocol {unknown[0]}: give A, B or L (C is A on two models: --model twice)")
    if given["free"] is not None and "B" not in (given["protocol"] or ()):
        raise LongtakeError(f"--free {given['free']} is for protocol B: add --protocol B")
    for name in ("seeds", "gap", "budget", "chunks", "steps"):
        values = given[name] if isinstance(given[name], list) else [given[name]]
        if (least := min((value for value in values if value is not None), default=1)) < 1:
            raise LongtakeError(f"--{name} {least}: give at least 1")
    for length in given["seconds"] or ():
        shell.check_seconds(length)


def _plan_of_world(given: dict[str, Any], device: str | None) -> Plan:
    from ..evaluate.compare.protocols import Setting
    from ..evaluate.compare.runner import Plan, default_models
    from ..zoo.lanes import GAPS

    own, gaps = Setting(), tuple(sorted(set(given["gap"] or GAPS)))
    settings = tuple(
        Setting(name, given["frames"] or own.frames, gaps, given["free"] or own.free)
        for name in dict.fromkeys(given["protocol"] or ("A",))
    )
    models = tuple(dict.fromkeys(given["model"] or default_models()))
    return Plan(
        models, tuple(given["policy"] or ()), tuple(given["budget"] or ()), seeds=given["seeds"] or SCENES,
        settings=settings, device=device, compressors=tuple(dict.fromkeys(given["compressor"] or ())),
        fitted=not given["as_given"],
    )  # fmt: skip


def _plan_of_takes(given: dict[str, Any], matrix: Matrix | None, device: str | None) -> Plan:
    from ..evaluate.compare.matrix import Matrix
    from ..evaluate.compare.runner import Plan

    if matrix is None:
        height, width = shell.parse_size(given["size"])
        many = lambda name: tuple(dict.fromkeys(given[name] or ()))
        matrix = Matrix(
            many("model"), many("policy"), many("budget"), many("reuse") or ("none",), many("prompt"),
            tuple(range(given["seeds"] or 1)), many("seconds"), many("chunks"), height, width, given["steps"],
            given["guidance"], given["negative"] or "",
        )  # fmt: skip
    return Plan(matrix.models or (options.DEFAULT_MODEL,), settings=(), device=device, takes=matrix)
