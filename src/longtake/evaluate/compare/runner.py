"""Running a comparison: every missing cell once, in processes of its own if wanted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from ...hosts.base import Host, HostConfig
from ...hosts.loading import embedded, load
from ...plan import HistoryShape
from ...session import default_policy, history_shape
from ...zoo import lanes
from ..provenance import provenance
from . import likelihood
from .against import compare_takes, likeness, reference_of
from .arms import MODEL_FREE, Arm, arms, controls, take_arms, with_compressors
from .cells import Cell, Store, label_of, weights_of
from .executor import Executor, Here, Job, Prepare, Processes
from .footage import Footage, has_codec
from .matrix import Matrix
from .protocols import Setting, run
from .takes import TakeSetting, make_take
from .writing import StoreError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be compared: models × arms × seeds under each setting, or a matrix of free takes."""

    models: tuple[str, ...]
    policies: tuple[str, ...] = ()  # empty: every policy that has a name
    budgets: tuple[int, ...] = ()  # latent frames of K/V; empty: three (`default_budgets`)
    seeds: int = 32
    settings: tuple[Setting, ...] = (Setting(),)
    device: str | None = None
    takes: Matrix | None = None  # instead of settings
    compressors: tuple[str, ...] = ()  # of policies that compress; empty: the model's own
    fitted: bool = True  # False: policies as they are, whatever they hold

    @property
    def classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Policies and reuse policies by the names they were given."""
        matrix = self.takes
        return (*self.policies, *(matrix.policies if matrix else ())), matrix.reuse if matrix else ()


def default_models() -> tuple[str, ...]:
    """The embedded models that were trained on the world and finish a chunk before the next. Raises LongtakeError if
    there is none."""
    read = {name: HostConfig.read(folder) for name, folder in embedded().items()}
    found = tuple(name for name, c in read.items() if c.world == lanes.WORLD and c.sampler != "staggered")
    if not found:
        raise LongtakeError(
            "no embedded model was trained on the procedural world: give --model with a folder that "
            "`longtake train tiny-wan` wrote"
        )
    return found


def cells(plan: Plan, notes: list[str]) -> list[Cell]:
    """All cells of a plan, seeds outermost, so that whatever is finished is a fair sample. Why a policy is not among
    them goes into `notes`. Raises LongtakeError for a model or a policy that cannot be compared."""
    if plan.takes is not None:
        return _cells_of_takes(plan, plan.takes, notes)
    if plan.seeds < 1:
        raise LongtakeError(f"{plan.seeds} seeds: give at least 1")
    listed: list[tuple[str, list[tuple[str, str, Arm]]]] = []
    for model in plan.models:
        host = _host(model, plan.device)
        if host.config.world != lanes.WORLD or not has_codec(host):
            raise LongtakeError(
                f"{model} was not trained on the procedural world, so there is no ground truth to read it against: "
                "give tiny-wan, tiny-wan-long, or a folder that `longtake train tiny-wan` wrote"
            )
        if host.config.sampler == "staggered":
            raise LongtakeError(
                f"{model} has several chunks in flight, so a past cannot be put under it chunk by chunk: compare free "
                "takes of it (--prompt), or judge reuse and compression on it with `longtake bench flowcache`"
            )
        if any(setting.protocol == "L" for setting in plan.settings):
            likelihood.check(host, model)
        shape = shape_of(host)
        budgets = (plan.budgets or default_budgets(host.config)) if plan.fitted else ()
        rows = [*controls(shape, host.config.training_frames), *arms(plan.policies, budgets, shape, notes)]
        rows = with_compressors(rows, plan.compressors)
        listed.append((model, [(*_weights(model, host, arm), arm) for arm in rows]))
    return [
        Cell(model, weights, dtype, arm, seed, setting)
        for seed in range(plan.seeds)
        for setting in plan.settings
        for model, rows in listed
        for weights, dtype, arm in rows
        if setting.protocol != "L" or arm.control not in MODEL_FREE  # nobody to be asked
    ]


def _cells_of_takes(plan: Plan, matrix: Matrix, notes: list[str]) -> list[Cell]:
    """The same of free takes; arms without reuse come first, since others are measured against them."""
    listed: list[tuple[str, str, str, Arm, TakeSetting]] = []
    for model in plan.models:
        host = _host(model, plan.device)
        geometry = host.geometry(matrix.height, matrix.width)
        guidance = host.config.guidance_scale if matrix.guidance is None else matrix.guidance
        shape = history_shape(host, geometry, streams=len(host.streams(guidance)))
        rows = take_arms(matrix.policies, matrix.budgets, matrix.reuse, shape, default_policy(host), notes)
        lengths = dict.fromkeys([*matrix.chunks, *(geometry.chunks(seconds) for seconds in matrix.seconds)])
        for chunks, prompt in itertools.product(lengths, matrix.prompts):
            setting = TakeSetting(
                prompt, chunks, geometry.height, geometry.width, matrix.steps, matrix.guidance, matrix.negative
            )
            listed += [(model, *_weights(model, host, arm), arm, setting) for arm in rows]
    listed.sort(key=lambda each: bool(each[3].reuse))  # stable
    return [
        Cell(model, weights, dtype, arm, seed, setting)
        for seed in matrix.seeds
        for model, weights, dtype, arm, setting in listed
    ]


def execute(
    plan: Plan, todo: Sequence[Cell], store: Store, folder: Path, workers: int = 1,
    progress: Progress = lambda done, total, last: None, prepare: Prepare | None = None,
    executor: Executor | None = None,
) -> list[str]:  # fmt: skip
    """Make every cell of `todo` that is not in the store, and measure takes against their references; returns a line
    for every arm that failed, once, and for every damaged cell, which is made again. Failed cells are tried again by
    the next run. `prepare` is called once in every worker process; `executor` takes the place of those processes.

    Raises StoreError if the folder cannot be written."""
    if executor is None:
        executor = Processes(workers, plan.classes, prepare) if workers > 1 else Here()
    notes = _set_aside(todo, store)
    missing = [cell for cell in todo if cell not in store]
    done, failed = len(todo) - len(missing), dict[str, list[int]]()
    progress(done, len(todo), "")
    jobs = [
        Job(i, _group(cell), partial(make, cell, store, folder, plan.device)) for i, cell in enumerate(missing)
    ]  # fmt: skip
    for job, error in executor.run(jobs):
        cell = missing[job.number]
        done += 1
        progress(done, len(todo), cell.arm.name)
        if error:
            failed.setdefault(f"{label_of(cell)}: {error}", []).append(cell.seed)
    pairs = [(cell, other) for cell in todo if cell in store and (other := _due(store, cell)) is not None]
    jobs = [
        Job(i, _group(cell), partial(measure, cell, other, store, plan.device)) for i, (cell, other) in enumerate(pairs)
    ]
    for job, error in executor.run(jobs) if jobs else ():
        cell = pairs[job.number][0]
        progress(done, len(todo), f"{cell.arm.name} against its reference")
        if error:
            failed.setdefault(f"{label_of(cell)}, against its reference: {error}", []).append(cell.seed)
    for cell in todo:
        if cell in store and reference_of(cell) is not None and likeness(store, cell) is None:
            line = f"{label_of(cell)}: no reference to measure it against; let --reuse have none too"
            if not any(known.startswith(f"{label_of(cell)}, against its reference: ") for known in failed):
                failed.setdefault(line, []).append(cell.seed)
    return notes + [f"{line} ({_counted(len(seeds))}, seed {min(seeds)} first)" for line, seeds in failed.items()]


def shape_of(host: Host) -> HistoryShape:
    """The sizes of a comparison's takes."""
    streams = len(host.streams(host.config.guidance_scale))
    return history_shape(host, host.geometry(lanes.SIZE, lanes.SIZE), streams=streams)


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
    setting, started = cell.setting, time.perf_counter()
    origin = lambda: {**_origin(str(host.device)), "seconds": round(time.perf_counter() - started, 3)}
    try:
        with store.workshop(cell) as made:
            if isinstance(setting, TakeSetting):
                outcome = make_take(cell.arm, host, setting, cell.seed, made)
            else:
                footage = _footage(cell.model, device, cell.seed, setting, folder)
                started = time.perf_counter()
                outcome = run(cell.arm, footage, setting, made)
            store.put(cell, outcome, {**origin(), "config": cell.key}, made)
    except StoreError:
        raise
    except Exception as error:  # a policy may be anybody's
        return _reason(error)
    return ""


def measure(cell: Cell, reference: Cell, store: Store, device: str | None) -> str:
    """Measure a take against its reference and keep the figures; if that fails, the first line of why."""
    try:
        compare_takes(_host(cell.model, device), store, cell, reference)
    except StoreError:
        raise
    except Exception as error:
        return _reason(error)
    return ""


def _due(store: Store, cell: Cell) -> Cell | None:
    """The reference that a finished cell has yet to be measured against, if it is there."""
    reference = reference_of(cell)
    there = reference is not None and reference in store
    return reference if there and likeness(store, cell) is None else None


def _set_aside(todo: Sequence[Cell], store: Store) -> list[str]:
    """Move damaged cells out of the way; a line for each."""
    notes = []
    for cell in todo:
        if cell in store and (damage := store.damage(cell)):
            kept = store.set_aside(cell)
            notes.append(
                f"cell {cell.key} ({label_of(cell)}, seed {cell.seed}) was damaged, {damage}: it was set aside as "
                f"cells/{kept} and is made again"
            )
    return notes


def _group(cell: Cell) -> int:
    """Cells that share frames: those of a scene, or of a prompt."""
    if isinstance(cell.setting, Setting):
        return cell.seed
    return hash((cell.seed, cell.model, cell.setting.prompt))


def _weights(model: str, host: Host, arm: Arm) -> tuple[str, str]:
    """Hash of the files that an arm computes with, and the type it does it in."""
    own = arm.compresses and not arm.compressor
    return weights_of(model, own), str(host.dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return lines[0] if isinstance(error, LongtakeError) else f"{type(error).__name__}: {lines[0]}"


@lru_cache(maxsize=4)
def _host(model: str, device: str | None) -> Host:
    return load(model, device=device)


@lru_cache(maxsize=2)
def _footage(model: str, device: str | None, seed: int, setting: Setting, folder: Path) -> Footage:
    host = _host(model, device)
    cache = folder / "truth" / weights_of(model, False) / "-".join(map(str, setting.gaps))
    return Footage(host, seed, setting.length(host), setting.gaps, cache)


@lru_cache(maxsize=1)
def _origin(device: str) -> dict[str, Any]:
    return provenance(torch.device(device))


def _counted(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells} cells"
