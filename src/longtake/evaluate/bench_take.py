"""`longtake bench take`: does a long take stay flat, and what does everything beside the model's forwards cost?

One process does it all on one named shape with random weights:

    take      a windowed take; near its beginning and at its end a snapshot, tensor bytes, memory, operations
    pairs     both snapshots replayed alternately, one chunk each: paired ratios late / early
    rounds    resident session, scratch session and bare forwards in turn: same token counts, so ratios are overhead
    curves    full history and window from the first chunk on, in turn
    codec     encoding and decoding of the embedded model, apart from all of the above
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..chunk import ChunkStats
from ..errors import LongtakeError
from ..history import LayerView
from ..hosts.loading import load
from ..hosts.wan import CausalWan
from ..policies import FullHistory, KVPolicy, SlidingWindow
from ..samplers.chunked import CLEAN_TIMESTEP, Schedule
from ..session import Session
from .bench_replay import replays
from .bench_report import Target
from .bench_shapes import SHAPES, Shape
from .bench_stage import Progress, staged
from .machine import Clock, named, place
from .measure import CountOperations, Figure, OpCounts, live_tensor_bytes, ratios, rss_bytes
from .take_report import Curve, TakeReport

CHUNKS = 300
PAIRS = 30  # fewer are measured if asked for, and judged by no target
REPEATS = 3  # runs of the curves
CODEC_MODEL = "tiny-shapes"
CODEC_RUNS = 12


@dataclass
class _Mark:
    """What the process held right after one chunk of the take."""

    tensor_bytes: int
    rss: int | None
    attended: int
    operations: OpCounts


@dataclass
class _Bench:
    """One run: the host, what is asked of it, and the answer as it fills."""

    host: CausalWan
    shape: Shape
    chunks: int
    pairs: int
    repeats: int
    seed: int
    report: TakeReport
    progress: Progress
    clock: Clock

    def session(self, policy: KVPolicy, residency: str = "resident", chunks: int | None = None) -> Session:
        generator = torch.Generator().manual_seed(self.seed)
        embeds = torch.randn(1, self.shape.text_tokens, self.shape.text_dim, generator=generator)
        return Session(
            self.host, policy, prompt_embeds=embeds, seed=self.seed, residency=residency, chunks=chunks, decode=False
        )

    @property
    def window(self) -> SlidingWindow:
        return SlidingWindow(self.shape.window, self.shape.sink)

    def chunk(self, session: Session) -> tuple[float, ChunkStats]:
        """Seconds of the next chunk, and its own account of itself."""
        seconds = self.clock.seconds(lambda: next(session))
        assert session.stats.last is not None
        return seconds, session.stats.last


def run(
    shape: str | Shape = "cpu-small", *, chunks: int = CHUNKS, pairs: int = PAIRS, repeats: int = REPEATS,
    device: str | None = None, dtype: str | None = None, threads: int | None = None, force: bool = False, seed: int = 0,
    command: str = "", progress: Progress | None = None,
) -> TakeReport:  # fmt: skip
    """Measure a take of `chunks` chunks at a named shape, with `pairs` replays of each snapshot.

    `device` defaults to the shape's own; `threads` are torch's, for the time of the run; `force` measures on a busy
    machine and says so in the report; `command` is recorded as it was typed.

    Raises LongtakeError for an unknown shape, device or dtype, for too few chunks or pairs, and on a busy machine.
    """
    shape = named(shape, SHAPES)
    where = place(device or shape.device, shape.name, "cpu-small")
    if where.type != shape.device:
        raise LongtakeError(f"shape {shape.name} is for {shape.device}, not {where.type}: use --device {shape.device}")
    if chunks < shape.early + 2 or pairs < 2 or repeats < 1:
        raise LongtakeError(
            f"{chunks} chunks, {pairs} pairs, {repeats} repeats: shape {shape.name} needs at least {shape.early + 2} "
            "chunks (its early snapshot comes first), 2 pairs and 1 repeat"
        )
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtype or shape.dtype, **options) as stage:
        report = TakeReport(
            **stage.head, shape=shape.as_dict(), missing=stage.others(SHAPES),
            settings=stage.settings | {
                "chunks": chunks, "early": shape.early, "pairs": pairs, "repeats": repeats,
                "curve_chunks": shape.curve_chunks, "seed": seed,
            },
        )  # fmt: skip
        host = shape.host(where, stage.dtype, seed)
        bench = _Bench(host, shape, chunks, pairs, repeats, seed, report, stage.progress, stage.clock)
        with tempfile.TemporaryDirectory(prefix="longtake-bench-") as folder:
            early, late = Path(folder) / "early.safetensors", Path(folder) / "late.safetensors"
            _take(bench, early, late)
            _pairs(bench, early, late)
        _rounds(bench)
        _curves(bench)
        _codec(bench)
    report.targets = _targets(report)
    return report


# --- the parts ------------------------------------------------------------------------------------------------------


def _take(bench: _Bench, early: Path, late: Path) -> None:
    """The long take. A snapshot stands one chunk early: a replay's first chunk only warms its new buffers."""
    session = bench.session(bench.window)
    files = {bench.shape.early: early, bench.chunks: late}
    marks: dict[int, _Mark] = {}
    for number in range(1, bench.chunks + 1):
        if number + 1 in files:
            session.snapshot(files[number + 1])
        if number not in files:
            next(session)
        else:
            with CountOperations() as operations:
                next(session)
            assert session.stats.last is not None
            tensor_bytes = live_tensor_bytes(bench.host.device)
            marks[number] = _Mark(tensor_bytes, rss_bytes(), session.stats.last.attended_tokens, operations)
        bench.progress("take", number, bench.chunks)
    first, last = marks[bench.shape.early], marks[bench.chunks]
    growth = None if first.rss is None or last.rss is None else last.rss - first.rss
    bench.report.counts |= {
        "chunk": [bench.shape.early, bench.chunks], "live_tensor_bytes": [first.tensor_bytes, last.tensor_bytes],
        "rss_bytes": [first.rss, last.rss], "rss_growth_bytes": growth,
        "operations": [first.operations.total, last.operations.total],
        "operations_equal_by_name": first.operations.by_name == last.operations.by_name,
        "attended_tokens": [first.attended, last.attended], "session_bytes": session.memory(),
    }  # fmt: skip


def _pairs(bench: _Bench, early: Path, late: Path) -> None:
    first, last = replays(
        early, late, bench.host, bench.pairs, lambda session: bench.chunk(session)[0],
        lambda done: bench.progress("pairs", done, bench.pairs),
    )  # fmt: skip
    bench.report.figures += [
        Figure.of("early chunk", "ms", _ms(first), bench.seed),
        Figure.of("late chunk", "ms", _ms(last), bench.seed),
        Figure.of("late / early", "", ratios(last, first), bench.seed),
    ]


class BareForwards:
    """The forwards of one chunk and nothing else: same weights, processors, query and key counts; the view is laid out
    once and for ever, no plan, no noise, no commit."""

    def __init__(self, host: CausalWan, text: Any, timesteps: tuple[float, ...], attended: int, frame: int) -> None:
        geometry = host.geometry()
        self.host, self.text, self.timesteps = host, text, timesteps
        height, width = geometry.latent_size
        self.latents = torch.randn(1, geometry.channels, geometry.chunk_frames, height, width)
        base, _ = host.positions(geometry, frame, geometry.chunk_frames)
        phases = host.rotary.phases(base.to(host.device))
        live = slice(attended - len(base), attended)
        size = (host.layers, 1, attended, host.kv_heads, host.head_dim)
        k, v = (torch.randn(size, dtype=host.dtype, device=host.device) for _ in range(2))
        self.views = [
            LayerView(host.rotary, phases, k[i], v[i], live, None, None, None, None) for i in range(host.layers)
        ]

    def __call__(self) -> None:
        for t in self.timesteps:
            self.host.forward(self.latents, t, self.text, self.views)


def _rounds(bench: _Bench) -> None:
    """Resident, scratch and bare in turn; who begins changes from round to round."""
    sessions = {r: bench.session(bench.window, r) for r in ("resident", "scratch")}
    warm = bench.shape.window // bench.shape.chunk_frames + 2
    for i, session in enumerate(sessions.values()):
        for number in range(warm):
            next(session)
            bench.progress("warming up", i * warm + number + 1, 2 * warm)
    host, resident = bench.host, sessions["resident"]
    assert resident.stats.last is not None
    schedule = Schedule.shifted(host.config.timesteps, host.config.shift)
    embeds = torch.zeros(1, bench.shape.text_tokens, bench.shape.text_dim)
    bare = BareForwards(
        host, host.text_state(embeds), (*schedule.timesteps, CLEAN_TIMESTEP), resident.stats.last.attended_tokens,
        resident.frame,
    )  # fmt: skip
    bare()
    seconds: dict[str, list[float]] = {"bare": [], "resident": [], "scratch": []}
    outside: dict[str, list[float]] = {"resident": [], "scratch": []}
    names = list(seconds)
    for number in range(bench.pairs):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            if name == "bare":
                seconds[name].append(bench.clock.seconds(bare))
                continue
            spent, stats = bench.chunk(sessions[name])
            seconds[name].append(spent)
            outside[name].append(spent - stats.forward_seconds - stats.decode_seconds)
        bench.progress("rounds", number + 1, bench.pairs)
    figures = bench.report.figures
    cost = bench.shape.flops.forward(resident.geometry.chunk_frames * resident.geometry.tokens_per_frame,
                                     resident.stats.last.attended_tokens, bench.shape.text_tokens)  # fmt: skip
    for name, work in (("bare forwards", "bare"), ("a chunk, resident view", "resident")):
        rate = cost.total * (len(schedule.timesteps) + 1) / float(np.median(seconds[work])) / 1e12
        bench.report.reach(name, bench.report.settings["dtype"], rate)
    figures.append(Figure.of("bare forwards", "ms", _ms(seconds["bare"]), bench.seed))
    for name in ("resident", "scratch"):
        figures.append(Figure.of(f"chunk, {name} view", "ms", _ms(seconds[name]), bench.seed))
        over_bare = ratios(seconds[name], seconds["bare"])
        figures.append(Figure.of(f"chunk / bare forwards, {name} view", "", over_bare, bench.seed))
        share, ms = f"outside forwards, {name} view", f"ms outside forwards, {name} view"
        if host.device.type == "cpu":
            figures.append(Figure.of(share, "of chunk", ratios(outside[name], seconds[name]), bench.seed))
            figures.append(Figure.of(ms, "ms", _ms(outside[name]), bench.seed))
        else:
            reason = "on a GPU forwards are timed until enqueued; see chunk / bare forwards"
            figures += [Figure.absent(share, "of chunk", reason), Figure.absent(ms, "ms", reason)]


def _curves(bench: _Bench) -> None:
    """Both takes from their first chunk on, in turn within every chunk number."""
    total = bench.shape.curve_chunks
    curves = {name: Curve([], [], []) for name in ("full history", "window")}
    for repeat in range(bench.repeats):
        sessions = {
            "full history": bench.session(FullHistory(), chunks=total), "window": bench.session(bench.window),
        }  # fmt: skip
        for curve in curves.values():
            curve.chunk_ms.append([])
            curve.outside_ms.append([])
            curve.attended.clear()
        for number in range(total):
            for name, session in sessions.items():
                seconds, stats = bench.chunk(session)
                curves[name].chunk_ms[-1].append(round(1e3 * seconds, 3))
                curves[name].outside_ms[-1].append(round(1e3 * (seconds - stats.forward_seconds), 3))
                curves[name].attended.append(stats.attended_tokens)
            bench.progress("curves", repeat * total + number + 1, bench.repeats * total)
        del sessions, session
        gc.collect()
    if bench.host.device.type != "cpu":
        for curve in curves.values():
            curve.outside_ms.clear()
    bench.report.curves = curves
    last = max(1, total // 10)
    for name, curve in curves.items():
        values = [x for run in curve.chunk_ms for x in run[-last:]]
        bench.report.figures.append(Figure.of(f"{name}, chunks {total - last + 1}–{total}", "ms", values, bench.seed))


def _codec(bench: _Bench) -> None:
    """Prompt encoding and streaming decode of the embedded model, at its own size."""
    encode, decode = f"{CODEC_MODEL}: encode a prompt", f"{CODEC_MODEL}: decode one chunk"
    try:
        host = load(CODEC_MODEL, device=bench.host.device)
        session = Session(host, prompt="a red ball", seed=bench.seed)
    except LongtakeError as error:
        bench.report.figures += [Figure.absent(encode, "ms", str(error)), Figure.absent(decode, "ms", str(error))]
        return
    encoding = [bench.clock.seconds(lambda: host.encode_prompt(["a red ball"])) for _ in range(CODEC_RUNS)]
    decoding = []
    for number in range(CODEC_RUNS + 2):
        seconds = bench.chunk(session)[1].decode_seconds
        if number >= 2:  # the first chunk decodes one frame less, the second allocates
            decoding.append(seconds)
        bench.progress("codec", number + 1, CODEC_RUNS + 2)
    bench.report.figures += [
        Figure.of(encode, "ms", _ms(encoding), bench.seed), Figure.of(decode, "ms", _ms(decoding), bench.seed),
    ]  # fmt: skip


# --- judging --------------------------------------------------------------------------------------------------------


def _targets(report: TakeReport) -> list[Target]:
    counts, settings = report.counts, report.settings
    first, last = counts["chunk"]
    at = f"chunk {first} and {last}"
    mega = lambda b: f"{b / 1e6:.2f} MB"
    a, b = counts["live_tensor_bytes"]
    growth, limit = counts["rss_growth_bytes"], 20e6
    x, y = counts["operations"]
    targets = [
        Target(f"live tensor bytes at {at}", "equal", f"{a} and {b}", a == b),
        Target(f"resident memory grown from {at}", "≤ 20 MB", "missing", None, "this system does not tell")
        if growth is None
        else Target(f"resident memory grown from {at}", "≤ 20 MB", mega(growth), growth <= limit),
        Target(
            f"operations of {at}", "equal, each kind", f"{x} and {y}", counts["operations_equal_by_name"],
        ),
        Target(f"attended tokens at {at}", "equal", "{} and {}".format(*counts["attended_tokens"]),
               counts["attended_tokens"][0] == counts["attended_tokens"][1]),
        _within(report.figure("late / early"), "95 % interval includes ≤", 1.05, lambda f: f.ci95[0] <= 1.05),
        _within(report.figure("outside forwards, resident view"), "≤", 0.02, lambda f: f.median <= 0.02),
        _within(report.figure("chunk / bare forwards, resident view"), "≤", 1.05, lambda f: f.median <= 1.05),
        _within(report.figure("chunk / bare forwards, scratch view"), "≤", 1.05, lambda f: f.median <= 1.05),
    ]  # fmt: skip
    if report.busy:
        note = f"other processes used {report.others_busy['during']:.0%} of the machine during the run"
        targets[-4:] = [replace(t, met=None, note=note) for t in targets[-4:]]
    if settings["chunks"] < CHUNKS or settings["pairs"] < PAIRS:
        note = f"not the full setting of {CHUNKS} chunks and {PAIRS} pairs"
        targets = [replace(t, met=None, note=note) for t in targets]
    return targets


def _within(figure: Figure, relation: str, limit: float, kept: Callable[[Any], bool]) -> Target:
    if figure.ci95 is None:
        return Target(figure.name, f"{relation} {limit}", "missing", None, figure.missing)
    found = f"{figure.median:.4f} [{figure.ci95[0]:.4f}, {figure.ci95[1]:.4f}]"
    note = "" if figure.ci95[1] <= limit else "the interval also reaches above the limit"
    return Target(figure.name, f"{relation} {limit}", found, kept(figure), note)


# --- small things ---------------------------------------------------------------------------------------------------


def _ms(seconds: list[float]) -> list[float]:
    return [1e3 * s for s in seconds]
