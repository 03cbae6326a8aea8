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


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for cells, summary.json and report.html.")],
    model: Annotated[list[str], typer.Option("--model", "-m", help="Model trained on the world; repeatable.")] = [  # noqa: B006
        "tiny-wan"
    ],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="name[:key=value,…]; repeatable. Default: every policy.")
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option("--budget", help="History budget, in latent frames of full K/V; repeatable.")
    ] = None,
    protocol: Annotated[list[str], typer.Option("--protocol", help="A, B, or both (repeat it).")] = ["A"],  # noqa: B006
    seeds: Annotated[int, typer.Option("--seeds", help="Scenes per arm.")] = 32,
    frames: Annotated[
        int, typer.Option("--frames", help="Protocol A: true latent frames committed, at most 200.")
    ] = 120,
    free: Annotated[int, typer.Option("--free", help="Protocol B: latent frames of the free run.")] = 504,
    gap: Annotated[
        list[int] | None,
        typer.Option("--gap", help="Latent frames an actor may be hidden; repeatable. Default: 1 to 64."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes, one thread each.")] = 1,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, …")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare KV policies at equal budgets on the procedural world, with controls; resumable.

    Stopped runs go on with the same command: finished cells stand in OUT/cells and are never made again.
    """
    import torch

    from ..evaluate.compare.cells import Store
    from ..evaluate.compare.protocols import Setting
    from ..evaluate.compare.report import page
    from ..evaluate.compare.runner import Plan, cells, execute
    from ..evaluate.compare.summary import summarise
    from ..evaluate.provenance import provenance, write_atomically
    from ..hosts.loading import load
    from ..zoo.lanes import GAPS

    if not 12 <= frames <= 200:
        raise LongtakeError(f"--frames {frames}: give 12 to 200 latent frames")
    if free < 6:
        raise LongtakeError(f"--free {free}: give at least 6 latent frames")
    if unknown := sorted(set(protocol) - {"A", "B"}):
        raise LongtakeError(f"--protocol {unknown[0]}: give A or B (C is A on a short and a long model: two --model)")
    if workers < 1:
        raise LongtakeError(f"--workers {workers}: give at least 1")
    if (gap and min(gap) < 1) or (budget and min(budget) < 1):
        raise LongtakeError("--gap and --budget take whole numbers from 1 up")
    shell.check_device(device)
    shell.hush()
    settings = tuple(Setting(name, frames, tuple(gap or GAPS), free) for name in dict.fromkeys(protocol))
    plan = Plan(tuple(model), tuple(policy or ()), tuple(budget or ()), seeds, settings, device)
    notes: list[str] = []
    todo, store = cells(plan, notes), Store(out)
    with CountProgress("comparing") as advance:
        execute(plan, todo, store, out, workers, advance)
    training = {name: load(name, device="cpu").config.training_frames for name in plan.models}
    summary = {
        "command": shlex.join(["longtake", *sys.argv[1:]]), "notes": notes, "cells": len(todo),
        "origin": provenance(torch.device(device or "cpu")), **summarise(todo, store, training),
    }  # fmt: skip
    write_atomically(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / "report.html", page(summary).encode())
    shell.answer(summary, f"{out / 'report.html'}: {len(todo)} cells, {len(summary['tables'])} tables", as_json)
