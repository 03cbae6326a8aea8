"""Running a comparison: every missing cell once, in processes of its own if wanted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from ...hosts.base import Host, HostConfig
from ...hosts.loading import embedded, load
from ...plan import HistoryShape
from ...policies import registry
from ...session import history_shape
from ...zoo import lanes
from ..provenance import provenance
from .arms import Arm, arms, controls
from .cells import Cell, Store, fingerprint, label_of
from .footage import Footage
from .protocols import Setting, run

WORLD = "lanes"

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


def default_models() -> tuple[str, ...]:
    """The embedded models that were trained on the world. Raises LongtakeError if there is none."""
    found = tuple(name for name, folder in embedded().items() if HostConfig.read(folder).world == WORLD)
    if not found:
        raise LongtakeError(
            "no embedded model was trained on the procedural world: give --model with a folder that "
            "`longtake train tiny-wan` wrote"
        )
    return found


def cells(plan: Plan, notes: list[str]) -> list[Cell]:
    """All cells of a plan, seeds outermost, so that whatever is finished is a fair sample. Why a policy is not among
    them goes into `notes`. Raises LongtakeError for a model or a policy that cannot be compared."""
    if plan.seeds < 1:
        raise LongtakeError(f"{plan.seeds} seeds: give at least 1")
    listed: list[tuple[str, str, str, list[Arm]]] = []
    for model in plan.models:
        host = _host(model, plan.device)
        if getattr(host, "vae", None) is None or host.config.world != WORLD:
            raise LongtakeError(
                f"{model} was not trained on the procedural world, so there is no ground truth to read it against: "
                "give a folder that `longtake train tiny-wan` wrote"
            )
        shape = shape_of(host)
        rows = [*controls(shape), *arms(plan.policies, plan.budgets or default_budgets(host.config), shape, notes)]
        folder = embedded().get(model) or Path(model).expanduser()
        listed.append((model, fingerprint(folder), str(host.dtype).removeprefix("torch."), rows))
    return [
        Cell(model, weights, dtype, arm, seed, setting)
        for seed in range(plan.seeds)
        for setting in plan.settings
        for model, weights, dtype, rows in listed
        for arm in rows
    ]


def execute(
    plan: Plan, todo: Sequence[Cell], store: Store, folder: Path, workers: int = 1,
    progress: Progress = lambda done, total, last: None, prepare: Callable[[], None] | None = None,
) -> list[str]:  # fmt: skip
    """Make every cell of `todo` that is not in the store; returns a line for every arm that failed, once. Failed cells
    are tried again by the next run. `prepare` is called once in every worker process."""
    missing = [cell for cell in todo if cell not in store]
    done, failed = len(todo) - len(missing), dict[str, list[int]]()
    progress(done, len(todo), "")
    if workers > 1:
        work = _apart(plan, missing, store, folder, workers, prepare)
    else:
        work = ((cell, make(cell, store, folder, plan.device)) for cell in missing)
    for cell, error in work:
        done += 1
        progress(done, len(todo), cell.arm.name)
        if error:
            failed.setdefault(f"{label_of(cell)}: {error}", []).append(cell.seed)
    return [f"{line} ({_counted(len(seeds))}, seed {min(seeds)} first)" for line, seeds in failed.items()]


def shape_of(host: Host) -> HistoryShape:
    """The sizes of a comparison's takes."""
    return history_shape(host, host.geometry(lanes.SIZE, lanes.SIZE))


def training_frames(plan: Plan) -> dict[str, int]:
    """Latent frames of a training clip, by model."""
    return {model: _host(model, plan.device).config.training_frames for model in plan.models}


def origin(plan: Plan) -> dict[str, Any]:
    """Where the cells that this process makes come from."""
    return _origin(str(_host(plan.models[0], plan.device).device))


def default_budgets(config: HostConfig) -> tuple[int, ...]:
    """About a third, two thirds and all of a training clip, in latent frames: whole chunks, three at least, all
    different."""
    chunk, budgets = config.chunk_frames, list[int]()
    for part in (1, 2, 3):
        least = budgets[-1] + chunk if budgets else 3 * chunk
        budgets.append(max(least, config.training_frames * part // 3 // chunk * chunk))
    return tuple(budgets)


def make(cell: Cell, store: Store, folder: Path, device: str | None) -> str:
    """Make one cell and keep it; if its arm fails, the first line of why."""
    if cell in store:  # made by another run meanwhile
        return ""
    host = _host(cell.model, device)
    footage = _footage(cell.model, device, cell.weights, cell.seed, cell.setting, folder)
    started = time.perf_counter()
    try:
        outcome = run(cell.arm, footage, cell.setting)
    except Exception as error:  # a policy may be anybody's
        lines = str(error).splitlines() or [""]
        return lines[0] if isinstance(error, LongtakeError) else f"{type(error).__name__}: {lines[0]}"
    seconds = round(time.perf_counter() - started, 3)
    store.put(cell, outcome, {**_origin(str(host.device)), "seconds": seconds})
    return ""


def _apart(
    plan: Plan, missing: list[Cell], store: Store, folder: Path, workers: int, prepare: Callable[[], None] | None
) -> Iterator[tuple[Cell, str]]:
    # A pool of one process for each worker, and all cells of a seed in one of them: its frames are encoded once.
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        options: dict[str, Any] = {"mp_context": context, "initializer": _begin, "initargs": (plan.policies, prepare)}
        pools = [ProcessPoolExecutor(1, **options) for _ in range(min(workers, plan.seeds))]
        for pool in pools:
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        jobs: dict[Future[str], Cell] = {
            pools[cell.seed % len(pools)].submit(make, cell, store, folder, plan.device): cell for cell in missing
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool:
            raise LongtakeError(
                "a worker process was killed, perhaps for want of memory: the same command goes on, with fewer "
                "--workers if need be"
            ) from None


def _begin(policies: Sequence[str], prepare: Callable[[], None] | None) -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: finish the cell first
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    for spec in policies:
        if ".py:" in spec:  # cells are unpickled after this: their policy's class has to be there
            registry.parse(spec)
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    # A pool's process does not notice that its parent was killed: it would wait for work for ever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@lru_cache(maxsize=4)
def _host(model: str, device: str | None) -> Host:
    return load(model, device=device)


@lru_cache(maxsize=2)
def _footage(model: str, device: str | None, weights: str, seed: int, setting: Setting, folder: Path) -> Footage:
    host = _host(model, device)
    cache = folder / "truth" / weights / "-".join(map(str, setting.gaps))
    return Footage(host, seed, setting.length(host), setting.gaps, cache)


@lru_cache(maxsize=1)
def _origin(device: str) -> dict[str, Any]:
    return provenance(torch.device(device))


def _counted(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells} cells"
