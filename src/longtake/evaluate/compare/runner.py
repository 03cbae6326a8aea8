"""Running a comparison: every missing cell once, in processes of its own if wanted, then the summary and the report."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from ...hosts.base import Host
from ...hosts.loading import embedded, load
from ...plan import HistoryShape
from ...session import history_shape
from ...zoo import lanes
from ..provenance import provenance
from .arms import Arm, arms, controls
from .cells import Cell, Store, fingerprint
from .protocols import Setting, run

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be compared: models × arms × seeds under each setting."""

    models: tuple[str, ...]
    policies: tuple[str, ...] = ()  # empty: every policy that has a name
    budgets: tuple[int, ...] = ()  # latent frames of K/V; empty: a third, two thirds and all of a training clip
    seeds: int = 32
    settings: tuple[Setting, ...] = (Setting(),)
    device: str | None = None


def cells(plan: Plan, notes: list[str]) -> list[Cell]:
    """All cells of a plan, seeds outermost, so that whatever is finished is a fair sample. Raises LongtakeError."""
    if plan.seeds < 1:
        raise LongtakeError(f"{plan.seeds} seeds: give at least 1")
    listed: list[tuple[str, str, list[Arm]]] = []
    for model in plan.models:
        host = load(model, device="cpu")
        _check(host, model)
        shape = shape_of(host)
        listed.append((model, fingerprint(_folder(model)), controls(shape) + arms(
            plan.policies, plan.budgets or default_budgets(host), shape, notes
        )))  # fmt: skip
    return [
        Cell(model, weights, arm, seed, setting)
        for seed in range(plan.seeds)
        for setting in plan.settings
        for model, weights, rows in listed
        for arm in rows
    ]


def execute(
    plan: Plan, todo: Sequence[Cell], store: Store, folder: Path, workers: int = 1, progress: Progress | None = None
) -> None:
    """Make every cell of `todo` that is not in the store."""
    missing = [cell for cell in todo if cell not in store]
    done = len(todo) - len(missing)
    if progress:
        progress(done, len(todo), "")
    if workers <= 1:
        for cell in missing:
            _make(cell, store, folder, plan.device)
            done += 1
            if progress:
                progress(done, len(todo), cell.arm.name)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        jobs = {pool.submit(_make, cell, store, folder, plan.device): cell for cell in missing}
        try:
            for job in as_completed(jobs):
                job.result()
                done += 1
                if progress:
                    progress(done, len(todo), jobs[job].arm.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def shape_of(host: Host) -> HistoryShape:
    """The sizes of a comparison's takes."""
    return history_shape(host, host.geometry(lanes.SIZE, lanes.SIZE))


def default_budgets(host: Host) -> tuple[int, ...]:
    """A third, two thirds and all of a training clip, in latent frames, whole chunks, at least three chunks."""
    chunk, clip = host.config.chunk_frames, host.config.training_frames
    return tuple(sorted({max(3 * chunk, clip * part // 3 // chunk * chunk) for part in (1, 2, 3)}))


_HOSTS: dict[tuple[str, str | None], Host] = {}


def _make(cell: Cell, store: Store, folder: Path, device: str | None) -> None:
    if cell in store:  # another process was faster
        return
    host = _HOSTS.setdefault((cell.model, device), load(cell.model, device=device))
    cache = folder / "truth" / cell.weights / f"{cell.setting.frames}-{'-'.join(map(str, cell.setting.gaps))}"
    started = time.perf_counter()
    outcome = run(host, cell.arm, cell.seed, cell.setting, cache)
    seconds = round(time.perf_counter() - started, 3)
    store.put(cell, outcome, {**provenance(torch.device(host.device)), "seconds": seconds})


def _one_thread() -> None:
    torch.set_num_threads(1)


def _folder(model: str) -> Path:
    return embedded().get(model) or Path(model).expanduser()


def _check(host: Host, model: str) -> None:
    if not hasattr(host, "vae") or host.config.world != "lanes":
        raise LongtakeError(
            f"{model} was not trained on the procedural world, so there is no ground truth to read it against: compare "
            "tiny-wan, tiny-wan-long, or a folder of `longtake train tiny-wan`"
        )


def describe(cell: Cell) -> dict[str, Any]:
    """A cell in one line of JSON."""
    return {"key": cell.key, **cell.facts}
