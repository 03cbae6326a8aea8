"""`longtake bench endless`: what becomes of a take of thousands of latent frames of a trained model.

For each policy and seed one take, decoded as it is made, of which no more is kept than numbers and both ends. A model
of the world of lanes is given one true clip of its training length and goes on by itself; another begins with its own
first prompt.

    memory    all live tensors of the process, again and again: after the history is full they do not grow
    pairs     snapshots from soon after the history was full, and from the end, replayed in turn: late / early
    light     slopes of mean luma and of contrast, whose intervals know that neighbouring frames are alike
    motion    what still moves by its law in the first and the last frames (see `lawful_motion`); in the world of lanes
              beside what is read of the true scene through the autoencoder
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import LongtakeError
from ..hosts.base import Host
from ..hosts.loading import load
from ..policies import KVPolicy, parse
from ..session import Session, history_shape
from ..zoo import lanes
from .bench_replay import replays
from .bench_report import Target
from .bench_stage import Progress, Stage, staged
from .compare.footage import Footage, InHalf, has_codec
from .compare.protocols import Setting
from .endless_report import LIGHT, EndlessReport, EndlessTake, Light, Mark, Truth
from .lawful_motion import Motion, of_lanes, of_steps, speed
from .machine import named, place, threads_for
from .measure import Figure, live_tensor_bytes, ratios, rss_bytes
from .metrics.light import brightness, contrast
from .metrics.trend import line

MODEL, POLICIES = "tiny-wan", ("packforcing",)
LATENT_FRAMES = 2000  # fewer are measured if asked for, and judged by no target
SETTLED = 3  # chunks without growth, until a history counts as full
BLOCK = 20  # latent frames whose light is averaged
UNIT = 1000  # latent frames a slope is for
SLOPE, SLOWER = 1.0, 1.05
RENDER = 480  # frames of a true scene drawn at once


@dataclass(frozen=True)
class Length:
    """A named size of the benchmark: latent frames of a take, seeds, pairs of replays for each, latent frames at either
    end in which motion is read, and about how many times all live tensors are counted."""

    name: str
    latent_frames: int
    seeds: int
    pairs: int
    edge: int
    marks: int


SHAPES = {
    length.name: length for length in (Length("long", 2001, 3, 10, 200, 48), Length("micro", 60, 1, 2, 24, 4))
}  # fmt: skip


@dataclass
class _Bench:
    """One run: the host, how much is asked of it, and the report as it fills."""

    host: Host
    stage: Stage
    report: EndlessReport
    chunks: int
    pairs: int
    edge: int  # latent frames
    block: int
    stride: int  # pixel frames of a latent frame

    @property
    def given(self) -> int:
        """True latent frames before a take of a known world."""
        return Setting("B").given(self.host)

    @property
    def frames(self) -> int:
        return self.chunks * self.host.config.chunk_frames

    def session(self, policy: KVPolicy, seed: int, footage: Footage | None) -> Session:
        """A take that has seen what it is given."""
        prompt = self.host.config.prompts[0] if footage is None else footage.scene.caption
        size = None if footage is None else lanes.SIZE
        session = Session(self.host, policy, prompt=prompt, seed=seed, height=size, width=size)
        assert session.decoder is not None
        session.decoder = InHalf(session.decoder, self.host)  # half of the time would go there, and none of it is told
        if footage is not None:
            session.extend(footage.latents(self.given))
        return session

    def light(self, courses: dict[str, list[np.ndarray]]) -> dict[str, Light]:
        """Of values of every frame, a piece at a time."""
        found = {}
        for name, pieces in courses.items():
            values, block = np.concatenate(pieces), self.block * self.stride
            whole = values[: len(values) // block * block].reshape(-1, block).mean(1)
            trend = line(values, block, UNIT * self.stride)
            found[name] = Light([round(float(value), 3) for value in whole], trend)
        return found


def run(
    shape: str | Length = "long", *, model: str = MODEL, policies: Sequence[str] = POLICIES,
    latent_frames: int | None = None, seeds: int | None = None, pairs: int | None = None, device: str | None = None,
    dtype: str | None = None, threads: int | None = None, force: bool = False, command: str = "",
    progress: Progress | None = None,
) -> EndlessReport:  # fmt: skip
    """Measure takes of `latent_frames` (rounded up to whole chunks) of a trained `model`, for each of `policies`
    (specs, such as "window:frames=21") and `seeds`, with `pairs` replays for each.

    What is not given is the named shape's. Without `threads` an embedded model runs on one CPU thread.
    Raises LongtakeError for an unknown shape, model, policy, device or dtype, for a take that is too short, and on a
    busy machine unless `force`.
    """
    length = named(shape, SHAPES)
    latent_frames = length.latent_frames if latent_frames is None else latent_frames
    seeds = length.seeds if seeds is None else seeds
    pairs = length.pairs if pairs is None else pairs
    if seeds < 1 or pairs < 2:
        raise LongtakeError(f"{seeds} seeds, {pairs} pairs: give at least 1 seed and 2 pairs")
    arms = {spec: parse(spec) for spec in policies}
    if not arms:
        raise LongtakeError("no policy: give at least one")
    where = place(device or ("cuda" if torch.cuda.is_available() else "cpu"), length.name, "long --device cpu")
    kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    host = _loaded(model, where, kind, list(arms.values()))
    chunk = host.config.chunk_frames
    chunks = math.ceil(latent_frames / chunk)
    edge = min(length.edge, latent_frames // 2) // chunk * chunk
    if chunks < 2 * SETTLED + 2:
        least = (2 * SETTLED + 2) * chunk
        raise LongtakeError(f"{latent_frames} latent frames are too short to tell an end: give {least} or more")
    block = max(1, min(BLOCK, chunks * chunk // 12))
    geometry = host.geometry()
    with staged(where, kind, **options, ceilings=()) as stage, threads_for(host, threads) as running:
        report = EndlessReport(
            **stage.head,
            shape=asdict(length) | {
                "name": f"{model}, {chunks * chunk} latent frames", "latent_frames": chunks * chunk, "seeds": seeds,
                "pairs": pairs, "chunk_frames": chunk, "height": geometry.height, "width": geometry.width,
            },
            settings=stage.settings | {
                "threads": running, "model": model, "world": host.config.world, "policies": list(arms),
                "seeds": list(range(seeds)), "edge": edge, "block": block, "compressor": host.compressor.describe(),
            },
        )  # fmt: skip
        stride = geometry.pixel_frames(2) - geometry.pixel_frames(1)
        bench = _Bench(host, stage, report, chunks, pairs, edge, block, stride)
        with tempfile.TemporaryDirectory(prefix="longtake-bench-") as folder:
            for seed in range(seeds):
                footage = _footage(bench, seed)
                for spec, policy in arms.items():
                    report.takes.append(_take(bench, spec, policy, seed, footage, Path(folder)))
    report.takes.sort(key=lambda take: list(arms).index(take.policy))
    report.figures = [figure for spec in arms for figure in _figures(report, spec)]
    report.targets = [target for spec in arms for target in _targets(report, spec)]
    return report


def _loaded(model: str, where: torch.device, dtype: str, policies: Sequence[KVPolicy]) -> Host:
    """The model, if it can be measured under all of the policies. Raises LongtakeError."""
    host = load(model, device=where, dtype=dtype)
    if not has_codec(host):
        raise LongtakeError(f"{model} has no autoencoder: nothing can be seen of its takes")
    if host.config.world not in ("", lanes.WORLD):
        raise LongtakeError(f"{model} is of the world {host.config.world!r}, which cannot be read here: only lanes can")
    if not host.config.world and not host.config.prompts:
        raise LongtakeError(f"{model} names no prompt of its own: give a model that does, or one of the world of lanes")
    shape = history_shape(host, host.geometry())
    for policy in policies:
        policy.settle(shape).check(shape)
    return host


def _footage(bench: _Bench, seed: int) -> Footage | None:
    """The true scene of a seed, of which it is noted what is normal; None for a model without a world."""
    host, given = bench.host, bench.given
    if not host.config.world:
        return None
    footage = Footage(host, seed, given + bench.frames, lanes.GAPS)
    start = lanes.STRIDE * (given - 1) + 1
    courses: dict[str, list[np.ndarray]] = {name: [] for name in LIGHT}
    total = lanes.STRIDE * bench.frames
    for first in range(0, total, RENDER):
        _look(courses, footage.scene.render(min(RENDER, total - first), start + first))
        bench.stage.progress(f"true scene {seed}", min(first + RENDER, total), total)
    seen = footage.latents(given + bench.edge)
    motion = of_lanes(footage.pixels(given, seen[:, :, given:]), footage.scene)
    bench.report.truths.append(Truth(seed, bench.light(courses), motion))
    return footage


# --- one take ---------------------------------------------------------------------------------------------------------


def _take(bench: _Bench, spec: str, policy: KVPolicy, seed: int, footage: Footage | None, folder: Path) -> EndlessTake:
    session = bench.session(policy, seed, footage)
    early, late = folder / "early.safetensors", folder / "late.safetensors"
    every, frames_made = max(1, bench.chunks // bench.report.shape["marks"]), 0
    marks: list[Mark] = []
    seconds: list[float] = []
    courses: dict[str, list[np.ndarray]] = {name: [] for name in LIGHT}
    ends: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    highest, full, settled = -1, 0, None
    for number in range(1, bench.chunks + 1):
        chunk = next(session)
        assert chunk.frames is not None
        frames = chunk.frames.numpy().copy()  # what is kept of it is no live tensor
        seconds.append(_without_decoding(session))
        history, made = chunk.stats.history_bytes, chunk.stats.latent_frames
        del chunk
        _look(courses, frames)
        if frames_made < bench.edge:
            ends[0].append(frames)
        frames_made += made
        if frames_made > bench.frames - bench.edge:
            ends[1].append(frames)
        if history > highest:
            highest, full = history, number
        if number == full + SETTLED and number < bench.chunks - SETTLED:  # again, if it grew again
            settled = number
            session.snapshot(early)
        if number == bench.chunks - 2:
            session.snapshot(late)
        if number % every == 0 or number == bench.chunks:
            marks.append(Mark(number, live_tensor_bytes(), history, rss_bytes()))
        bench.stage.progress(f"{spec}, seed {seed}", number, bench.chunks)
    held = session.memory()
    bounded = session.policy.capacity(session.history.shape) is not None
    chosen = session.policy
    del session
    times: tuple[list[float], list[float]] = [], []
    if settled is not None:
        told = lambda done: bench.stage.progress(f"{spec}, seed {seed}, pairs", done, bench.pairs)
        times = replays(early, late, bench.host, bench.pairs, _timed, told, chosen)
    first, last = _motion(bench, footage, *(np.concatenate(pieces) for pieces in ends))
    return EndlessTake(
        spec, seed, frames_made, full, settled, bounded, marks, held, _ms(seconds), _ms(times[0]), _ms(times[1]),
        bench.light(courses), first, last,
    )  # fmt: skip


def _look(courses: dict[str, list[np.ndarray]], frames: np.ndarray) -> None:
    for name, measure in zip(LIGHT, (brightness, contrast), strict=True):
        courses[name].append(measure(frames))


def _timed(session: Session) -> float:
    next(session)
    return _without_decoding(session)


def _without_decoding(session: Session) -> float:
    """Seconds of the last chunk but for its decoding, which is the same at any moment and would hide what is not."""
    assert session.stats.last is not None
    return session.stats.last.seconds - session.stats.last.decode_seconds


def _motion(bench: _Bench, footage: Footage | None, first: np.ndarray, last: np.ndarray) -> tuple[Motion, Motion]:
    """What moves by its law at both ends of a take; without a world, at the speed of the take's first clip."""
    if footage is not None:
        return of_lanes(first, footage.scene), of_lanes(last, footage.scene)
    begun = speed(first[: bench.host.config.training_frames * bench.stride], bench.stride)
    return of_steps(first, bench.stride, begun), of_steps(last, bench.stride, begun)


# --- what it comes to -------------------------------------------------------------------------------------------------


def _figures(report: EndlessReport, policy: str) -> list[Figure]:
    takes = report.takes_of(policy)
    early = [ms for take in takes for ms in take.early_ms]
    late = [ms for take in takes for ms in take.late_ms]
    names = [f"{what}, {policy}" for what in ("early chunk", "late chunk", "late / early")]
    if early:
        figures = [
            Figure.of(names[0], "ms", early), Figure.of(names[1], "ms", late),
            Figure.of(names[2], "", ratios(late, early)),
        ]  # fmt: skip
    else:
        reason = "the history was never full for long enough before the end"
        figures = [Figure.absent(name, unit, reason) for name, unit in zip(names, ("ms", "ms", ""), strict=True)]
    unit = f"grey levels / {UNIT:,} latent frames"
    for name in LIGHT:
        slopes = [take.light[name].trend for take in takes]
        title = f"slope of {name}, {policy}"
        if all(slopes):
            figures.append(Figure.of(title, unit, [slope.slope for slope in slopes if slope]))
        else:
            figures.append(Figure.absent(title, unit, "too short for a slope"))
    return figures


def _targets(report: EndlessReport, policy: str) -> list[Target]:
    takes = report.takes_of(policy)
    targets = [_flat(takes, policy), _as_fast(report, policy)]
    targets += [_level(takes, policy, name) for name in LIGHT]
    moving = sum(take.last.moves for take in takes)
    found = f"{moving} of {len(takes)} seeds: " + "; ".join(take.last.cell() for take in takes)
    edge = report.settings["edge"]
    targets.append(Target(
        f"something moves by its law in the last {edge} latent frames, {policy}", "every seed", found,
        moving == len(takes),
    ))  # fmt: skip
    if (least := min(take.latent_frames for take in takes)) < LATENT_FRAMES:
        note = f"{least} latent frames, not the {LATENT_FRAMES:,} that are promised"
        targets = [replace(target, met=None, note=note) for target in targets]
    return targets


def _flat(takes: Sequence[EndlessTake], policy: str) -> Target:
    """Whether all that lives stays as much once the history is full."""
    name = f"live tensor bytes, most − least once the history is full, {policy}"
    spans, short = [], []
    for take in takes:
        marks = [mark.tensors for mark in take.full_marks]
        spans.append(max(marks) - min(marks))
        if len(marks) < 3:
            short.append(take)
    found = ", ".join(f"{span:,}" for span in spans)
    if not short:
        return Target(name, "0 for every seed", found, not any(spans))
    grown = f"the history still grew at chunk {max(take.full for take in short)} of {len(short[0].chunk_ms)}"
    return Target(name, "0 for every seed", grown, None if all(take.bounded for take in short) else False)


def _as_fast(report: EndlessReport, policy: str) -> Target:
    figure = report.figure(f"late / early, {policy}")
    limit = f"95 % interval includes ≤ {SLOWER}"
    if figure.ci95 is None or figure.median is None:
        bounded = all(take.bounded for take in report.takes_of(policy))
        return Target(figure.name, limit, "missing", None if bounded else False, figure.missing)
    low, high = figure.ci95
    found = f"{figure.median:.4f} [{low:.4f}, {high:.4f}]"
    if report.busy:
        note = f"other processes used {report.others_busy['during']:.0%} of the machine during the run"
        return Target(figure.name, limit, found, None, note)
    note = "" if high <= SLOWER else "the interval also reaches above the limit"
    return Target(figure.name, limit, found, low <= SLOWER, note)


def _level(takes: Sequence[EndlessTake], policy: str, name: str) -> Target:
    """Whether a measure of light keeps its level in every take."""
    title, limit = f"|slope| of {name}, grey levels per {UNIT:,} latent frames, {policy}", f"≤ {SLOPE:g}, every seed"
    found = ", ".join(take.light[name].cell() for take in takes)
    trends = [take.light[name].trend for take in takes]
    if not all(trends):
        return Target(title, limit, found, None, "too short for a slope")
    inside: Callable[[Any], bool] = lambda t: t.low is not None and t.low >= -SLOPE and t.high <= SLOPE
    beyond = sum(not inside(trend) for trend in trends)
    note = f"{beyond} of {len(trends)} intervals also reach beyond it, or cannot be told" if beyond else ""
    return Target(title, limit, found, all(abs(trend.slope) <= SLOPE for trend in trends if trend), note)


def _ms(seconds: Sequence[float]) -> list[float]:
    return [round(1e3 * s, 3) for s in seconds]
