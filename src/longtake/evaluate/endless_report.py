"""What `longtake bench endless` found: every take beside the common fields, their table and their picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .bench_report import Report, table
from .canvas import ACCENT, INK, PALE, canvas, png
from .lawful_motion import Motion
from .metrics.trend import Trend

LIGHT = ("mean luma", "contrast")  # grey levels, 0 … 255


@dataclass
class Light:
    """A measure of light over a take: means over blocks of equal length, their slope in grey levels per 1,000 latent
    frames (None: too few blocks)."""

    blocks: list[float]
    trend: Trend | None

    def cell(self) -> str:
        """For people."""
        if self.trend is None:
            return "missing"
        if self.trend.low is None or self.trend.high is None:
            return f"{self.trend.slope:+.2f} [cannot tell]"
        return f"{self.trend.slope:+.2f} [{self.trend.low:+.2f}, {self.trend.high:+.2f}]"


@dataclass
class Mark:
    """What the process held right after a chunk (counted from 1) of the take, in bytes; `rss` is None where the system
    does not tell."""

    chunk: int
    tensors: int
    history: int
    rss: int | None


@dataclass
class EndlessTake:
    """One policy and seed. `full` is the first chunk that leaves as much history as any; `settled` the one after which
    the early snapshot was taken, None if there was none; times are of chunks without decoding."""

    policy: str
    seed: int
    latent_frames: int
    full: int
    settled: int | None
    bounded: bool  # by its own account the policy stops growing
    marks: list[Mark]
    session_bytes: dict[str, int]
    chunk_ms: list[float]
    early_ms: list[float]
    late_ms: list[float]
    light: dict[str, Light]
    first: Motion
    last: Motion

    @property
    def full_marks(self) -> list[Mark]:
        """Marks from the chunk on after which the history grows no more."""
        return [mark for mark in self.marks if mark.chunk >= self.full]


@dataclass
class Truth:
    """The true scene of a seed: its light as it is drawn, its motion as the autoencoder shows it."""

    seed: int
    light: dict[str, Light]
    motion: Motion


@dataclass(kw_only=True)
class EndlessReport(Report):
    """Everything `longtake bench endless` found; `truths` only for a model of a world that is known."""

    kind: ClassVar[str] = "endless"

    takes: list[EndlessTake] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)

    def takes_of(self, policy: str) -> list[EndlessTake]:
        return [take for take in self.takes if take.policy == policy]

    def own_lines(self) -> list[str]:
        lines = []
        for take in self.takes:
            light = ", ".join(f"{name} {value.cell()}" for name, value in take.light.items())
            lines.append(
                f"{take.policy}, seed {take.seed}: {light} per 1,000 latent frames; {take.first.cell()} at the "
                f"beginning, {take.last.cell()} at the end"
            )
        for truth in self.truths:
            light = ", ".join(f"{name} {value.cell()}" for name, value in truth.light.items())
            lines.append(f"the true scene, seed {truth.seed}: {light}; {truth.motion.cell()}")
        return lines

    def own_tables(self) -> list[str]:
        edge = self.settings["edge"]
        head = ("take", "seed", "history full at chunk", "history", "live tensors, then", "resident, then",
                *(f"slope of {name}" for name in LIGHT),
                f"lawful, first {edge} latent frames", f"last {edge}")  # fmt: skip
        rows: list[tuple[str, ...]] = [
            (take.policy, str(take.seed), str(take.full), f"{take.marks[-1].history / 1e6:.2f} MB",
             _grown([mark.tensors for mark in take.full_marks]), _grown([mark.rss for mark in take.full_marks]),
             *(take.light[name].cell() for name in LIGHT), take.first.cell(), take.last.cell())
            for take in self.takes
        ]  # fmt: skip
        rows += [
            ("the true scene", str(t.seed), *[""] * 4, *(t.light[name].cell() for name in LIGHT), t.motion.cell(), "")
            for t in self.truths
        ]
        return [table(head, rows)]

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)}


def _grown(held: list[int | None]) -> str:
    """Bytes at first, and what came to them until the end."""
    first, last = held[0], held[-1]
    return "missing" if first is None or last is None else f"{first / 1e6:.2f} {(last - first) / 1e6:+.2f} MB"


def draw(report: EndlessReport) -> bytes:
    """PNG: light, live tensor bytes and milliseconds per chunk over the takes."""
    figure, (light, held, times) = canvas(12, 3.6, 1, 3)
    block, chunk = report.settings["block"], report.shape["chunk_frames"]
    policies = list(dict.fromkeys(take.policy for take in report.takes))
    colours = dict(zip(policies, (ACCENT, INK, "#5b8c3e", "#7a5195", "#b08900") * len(policies), strict=False))
    for truth in report.truths:
        label = "the true scene" if truth is report.truths[0] else None
        values = truth.light[LIGHT[0]].blocks
        light.plot([block * (n + 0.5) for n in range(len(values))], values, color=PALE, lw=0.8, label=label)
    for take in report.takes:
        style = {"color": colours[take.policy], "lw": 1.0, "alpha": 0.8}
        label = take.policy if take is report.takes_of(take.policy)[0] else None
        for name, dashes in zip(LIGHT, ("-", ":"), strict=True):
            values = take.light[name].blocks
            at = [block * (n + 0.5) for n in range(len(values))]
            light.plot(at, values, ls=dashes, label=label if dashes == "-" else None, **style)
        held.plot([chunk * m.chunk for m in take.marks], [m.tensors / 1e6 for m in take.marks], label=label, **style)
        steps = [chunk * (n + 1) for n in range(len(take.chunk_ms))]
        times.plot(steps, take.chunk_ms, label=label, **{**style, "lw": 0.5})
    light.set(title="mean luma, dotted: contrast", xlabel="latent frame", ylabel="grey levels")
    held.set(title="live tensors", xlabel="latent frame", ylabel="MB", ylim=(0, 1.1 * held.get_ylim()[1]))
    times.set(title="one chunk, decoding apart", xlabel="latent frame", ylabel="ms", ylim=(0, times.get_ylim()[1]))
    for axes in (light, held, times):
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(frameon=False, fontsize=7)
    return png(figure, report.caption())
