"""`longtake bench gpu`: everything that wants a GPU, in one process and within a given time.

For each of four published models, with random weights: every distinct forward of its takes, timed; what takes come to,
summed from those; and whole chunks, run, where memory and time allow. Then the ways of one layer, CUDA graphs, and what
quantised history costs in precision. Without a GPU all of it is said to be missing, but for the precision; the "micro"
shapes run anywhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ...errors import LongtakeError
from ...hosts.base import Host
from ...hosts.loading import load
from ...planner.lumos import LumosShape
from ...policies import parse
from ...session import Session
from ..bench_report import Missing
from ..bench_stage import Progress, Stage, staged
from ..machine import named, place
from . import forwards as single
from .forwards import Size
from .models import SHAPES, Model, prompt_of
from .paths import graph_paths, layer_paths
from .precision import history_errors
from .report import ForwardRow, GpuReport, PathRow, TotalRow

MINUTES = 10.0
LAST = 0.15  # of the time: for kernels, graphs and precision
PRECISION_MODEL, PRECISION_CHUNKS = "tiny-wan", 8
FITS = (torch.OutOfMemoryError, LongtakeError, RuntimeError)


class OutOfTime(Exception):
    """A take did not finish by its deadline."""


def run(
    shape: str = "published", *, minutes: float = MINUTES, device: str | None = None, dtype: str | None = None,
    threads: int | None = None, force: bool = False, command: str = "", progress: Progress | None = None,
) -> GpuReport:  # fmt: skip
    """Measure; raises LongtakeError for unknown names and on a busy machine."""
    models = named(shape, SHAPES)
    if not minutes > 0:
        raise LongtakeError(f"{minutes:g} minutes: give more than 0")
    where = place(device or ("cuda" if torch.cuda.is_available() else "cpu"), shape, "micro --device cpu")
    kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    started = time.monotonic()
    absent = where.type != "cuda" and shape != "micro"
    with staged(where, kind, **options, ceilings=None if where.type == "cuda" else ()) as stage:
        report = GpuReport(
            **stage.head, shape={"name": shape, "models": [m.shape.name for m in models]}, settings=stage.settings,
            minutes=minutes,
        )  # fmt: skip
        ends = started + 60 * minutes
        for number, model in enumerate(models):
            left = (ends - time.monotonic()) * (1 - LAST) / (len(models) - number)
            if absent:
                _all_missing(model, report, f"needs a CUDA device, this run was on {where.type}")
            else:
                _model(model, stage, report, time.monotonic() + left)
            stage.progress("models", number + 1, len(models))
        wan = next(m for m in models if m.family == "wan")
        if absent:
            _no_paths(report, f"needs a CUDA device, this run was on {where.type}")
        else:
            _paths(wan, stage, report)
        report.errors = history_errors(
            load(PRECISION_MODEL, device="cpu"), PRECISION_MODEL, 2 if shape == "micro" else PRECISION_CHUNKS,
            prompt="a red ball bouncing",
        )  # fmt: skip
        return report


def _model(model: Model, stage: Stage, report: GpuReport, ends: float) -> None:
    """One model's rows, until `ends`; whole chunks get what its forwards leave."""
    name = model.shape.name
    try:
        host = model.host(stage.device, stage.dtype, 0)
    except FITS as error:
        return _all_missing(model, report, _why(error))
    try:
        half = time.monotonic() + 0.6 * (ends - time.monotonic())
        counts, beyond = single.sizes(model)
        seconds = _forwards(model, host, counts, stage, report, half)
        for spec, count in counts.items():
            report.totals.append(_summed(model, spec, count, seconds))
        report.missing += [Missing(f"{name} under {spec}", reason) for spec, reason in beyond.items()]
        for spec in model.takes:
            report.totals += list(_takes(model, host, spec, stage, ends))
    finally:
        del host
        with single.memory_of(stage.device):
            pass


def _forwards(
    model: Model, host: Host, counts: dict[str, Counter[Size]], stage: Stage, report: GpuReport, ends: float
) -> dict[Size, float]:
    """Median seconds of each distinct size; sizes that were not reached, or do not fit, become missing rows."""
    name, found = model.shape.name, {}
    sizes = sorted({size for count in counts.values() for size in count})
    flops = model.shape.flop_shape  # type: ignore[attr-defined]
    for size in sizes:
        tokens, keys, text = size
        cost = float(flops.forward(tokens, keys, text).total)
        if time.monotonic() > ends:
            report.forwards.append(ForwardRow(name, *size, "missing", flops=cost, reason="out of time"))
            continue
        try:
            with single.memory_of(stage.device):
                values = _repeated(single.forward_of(model, host, size), stage, ends)
        except (*FITS, ValueError) as error:
            report.forwards.append(ForwardRow(name, *size, "missing", flops=cost, reason=_why(error)))
            continue
        found[size] = float(np.median(values))
        report.forwards.append(ForwardRow(name, *size, "run", found[size], len(values), cost))
    return found


def _repeated(work: Callable[[], Any], stage: Stage, ends: float) -> list[float]:
    """Seconds of up to `REPEATS` calls, three at least."""
    for _ in range(single.WARMUP):
        work()
    values: list[float] = []
    while len(values) < 3 or (len(values) < single.REPEATS and time.monotonic() < ends):
        values.append(stage.clock.seconds(work))
    return values


def _summed(model: Model, spec: str, count: Counter[Size], seconds: dict[Size, float]) -> TotalRow:
    """All forwards of a take, added up: nothing between them, no sampler and no decoding."""
    what = f"forwards of {model.frames} frames"
    lacking = [size for size in count if size not in seconds]
    made = sum(count.values())
    if lacking:
        reason = f"{len(lacking)} of {len(count)} forward sizes were not timed"
        return TotalRow(model.shape.name, spec, what, "missing", forwards=made, reason=reason)
    total = sum(n * seconds[size] for size, n in count.items())
    return TotalRow(model.shape.name, spec, what, "summed", total, model.frames, made)


def _takes(model: Model, host: Host, spec: str, stage: Stage, ends: float) -> Iterator[TotalRow]:
    """Chunks of a session, each timed as a whole, until time is up."""
    name = model.shape.name

    def in_time(session: Session, step: int, timestep: float, state: dict[str, Any]) -> None:
        if time.monotonic() > ends:
            raise OutOfTime

    made = 0
    try:
        take = Session(
            host, parse(spec), chunks=model.chunks, decode=False, callback_on_step_end=in_time, **_given(model, host)
        )
        for made in range(model.chunks):
            started = stage.clock.now()
            chunk = next(take)
            seconds = stage.clock.now() - started
            pixels = chunk.stats.latent_frames * take.geometry.stride[0]
            yield TotalRow(name, spec, f"chunk {made}", "run", seconds, pixels, chunk.stats.forwards)
    except OutOfTime:
        yield TotalRow(name, spec, f"chunk {made}", "missing", reason="out of time")
    except FITS as error:
        yield TotalRow(name, spec, f"chunk {made}", "missing", reason=_why(error))


def _given(model: Model, host: Host) -> dict[str, Any]:
    """What a session of a model is begun with: a prompt, and for Lumos-1 a first image."""
    text = getattr(model.shape, "text_tokens", 0)
    given: dict[str, Any] = {"prompt_embeds": prompt_of(model, host, text)}
    if isinstance(model.shape, LumosShape):
        given["image"] = torch.zeros(3, model.shape.height, model.shape.width)
    elif host.streams(host.config.guidance_scale) != ("cond",):
        given["negative_prompt_embeds"] = prompt_of(model, host, text, seed=1)
    return given


def _paths(model: Model, stage: Stage, report: GpuReport) -> None:
    host = model.host(stage.device, stage.dtype, 0)
    policy: Any = parse(model.policies[0])
    report.paths += list(layer_paths(host, policy.frames - host.config.chunk_frames, stage.clock))
    report.paths += list(graph_paths(host, policy, _given(model, host), model.chunks, stage.clock))


def _no_paths(report: GpuReport, reason: str) -> None:
    for what, ways in (
        ("view and attention of a layer", ("PyTorch", "Triton")), ("a chunk", ("as it is", "CUDA graphs")),
    ):  # fmt: skip
        report.paths += [PathRow(what, way, "missing", reason=reason) for way in ways]


def _all_missing(model: Model, report: GpuReport, reason: str) -> None:
    """A row for everything that would have been measured: forwards are known without a GPU."""
    name, flops = model.shape.name, model.shape.flop_shape  # type: ignore[attr-defined]
    counts, beyond = single.sizes(model)
    for size in sorted({size for count in counts.values() for size in count}):
        cost = float(flops.forward(*size).total)
        report.forwards.append(ForwardRow(name, *size, "missing", flops=cost, reason=reason))
    for spec, count in counts.items():
        what = f"forwards of {model.frames} frames"
        made = sum(count.values())
        report.totals.append(TotalRow(name, spec, what, "missing", forwards=made, reason=reason))
    report.missing += [Missing(f"{name} under {spec}", why) for spec, why in beyond.items()]
    report.totals += [TotalRow(name, spec, "chunks", "missing", reason=reason) for spec in model.takes]


def _why(error: BaseException) -> str:
    """One line."""
    return str(error).split("\n")[0] or type(error).__name__
