"""`longtake compare`: policies against each other, on a world whose truth is known."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LongtakeError
from . import options, shell
from .progress import CountProgress

FEWEST, MOST = 12, 200  # true latent frames


def compare(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for cells, summary.json and report.html.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="NAME|DIR", help="Model trained on the world; repeatable.",
            show_default="every embedded one",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", "-p", metavar="NAME[:KEY=VALUE,…]|FILE.py:CLASS", help="KV policy; repeatable.",
            show_default="every policy that has a name",
        ),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            "--budget", metavar="N", help="History budget, in latent frames of full K/V; repeatable.",
            show_default="a third, two thirds and all of a training clip",
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", metavar="A|B", help="A, B, or both (repeat it).", show_default="A"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Scenes of every arm.")] = 32,
    frames: Annotated[
        int, typer.Option("--frames", metavar="N", help=f"True latent frames committed, {FEWEST} to {MOST}.")
    ] = 120,
    free: Annotated[int, typer.Option("--free", metavar="N", help="Protocol B: latent frames of the free run.")] = 504,
    gap: Annotated[
        list[int] | None,
        typer.Option(
            "--gap", metavar="N", help="Latent frames for which an actor may be hidden; repeatable.",
            show_default="1, 2, 4 … 64",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Processes, one thread each.")] = 1,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Compare KV policies at equal budgets on the procedural world, with controls; resumable.

    A stopped run goes on with the same command: finished cells stand in DIR/cells and are never made again.
    """
    wanted = tuple(dict.fromkeys(protocol or ("A",)))
    if not FEWEST <= frames <= MOST:
        raise LongtakeError(f"--frames {frames}: give {FEWEST} to {MOST} latent frames")
    if free < 6:
        raise LongtakeError(f"--free {free}: give at least 6 latent frames")
    if unknown := sorted(set(wanted) - {"A", "B"}):
        raise LongtakeError(f"--protocol {unknown[0]}: give A or B")
    for option, values in (("--workers", [workers]), ("--seeds", [seeds]), ("--gap", gap), ("--budget", budget)):
        if values and min(values) < 1:
            raise LongtakeError(f"{option} {min(values)}: give at least 1")

    from ..evaluate.compare.cells import Store
    from ..evaluate.compare.protocols import Setting
    from ..evaluate.compare.report import page
    from ..evaluate.compare.runner import Plan, cells, default_models, execute, origin, training_frames
    from ..evaluate.compare.summary import summarise
    from ..evaluate.provenance import write_atomically
    from ..zoo.lanes import GAPS

    shell.check_device(device)
    shell.hush()
    settings = tuple(Setting(name, frames, tuple(sorted(set(gap or GAPS))), free) for name in wanted)
    models = tuple(dict.fromkeys(model or default_models()))
    plan = Plan(models, tuple(policy or ()), tuple(budget or ()), seeds, settings, device)
    notes: list[str] = []
    todo, store = cells(plan, notes), Store(out)
    with CountProgress("comparing") as advance:
        notes += execute(plan, todo, store, out, workers, advance, shell.hush)
    summary = {
        "command": shlex.join(["longtake", *sys.argv[1:]]), "notes": notes, "cells": len(todo),
        "finished": sum(cell in store for cell in todo), "origin": origin(plan),
        **summarise(todo, store, training_frames(plan)),
    }  # fmt: skip
    write_atomically(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / "report.html", page(summary).encode())
    text = f"{out / 'report.html'}: {summary['finished']} of {len(todo)} cells, {len(summary['tables'])} tables"
    if notes:
        text += f", {len(notes)} notes"
    shell.answer(summary, text, as_json)
