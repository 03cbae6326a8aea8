"""What `longtake bench flowcache` found: speed and likeness of every arm, and their picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .bench_report import Report, table
from .canvas import ACCENT, INK, PALE, canvas, png
from .compare.statistics import interval

PIPELINE = "diffusers pipeline"
READ = ("lawful", "colour", "texture")  # what is read of returning actors
LEVEL = 0.05  # of a difference that is marked

Interval = tuple[float, float] | None  # 95 %; None where too few seeds have anything


@dataclass
class ShapeTime:
    """A forward of `queries` tokens that sees `keys`, its own included: seconds by itself, and how often it ran."""

    queries: int
    keys: int
    seconds: float
    forwards: int


@dataclass
class SpeedRow:
    """One arm on one model: seconds of whole takes, round by round; what was skipped; what its forwards should take."""

    model: str
    arm: str
    seconds: list[float] = field(default_factory=list)
    skipped: float | None = None  # share of steps reused
    shapes: list[ShapeTime] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def predicted(self) -> float | None:
        """Seconds, as the sum over shapes."""
        return sum(s.seconds * s.forwards for s in self.shapes) if self.shapes else None


@dataclass
class Rate:
    """A share of events, its 95 % interval by seed, and its paired difference to the arm it is compared with, with the
    p of that."""

    mean: float
    ci95: Interval
    gap: float = 0.0
    gap_ci95: Interval = (0.0, 0.0)
    p: float = 1.0

    def cell(self) -> str:
        return f"{self.mean:.0%}{_within(self.ci95, '.0%')} ({_gap(100 * self.gap, _percent(self.gap_ci95), self.p)})"


@dataclass
class Compared:
    """One arm less another in one measure, paired by seed. Of an interaction `first` and `second` are sums: what both
    do together and neither does, and what each does alone."""

    measure: str
    first: str
    second: str
    gap: float
    ci95: Interval
    p: float
    holm: float  # p, corrected for all comparisons of this measure

    def cell(self) -> str:
        scale, form = (100, "+.1f") if self.measure in READ else (1, "+.3g")
        within = None if self.ci95 is None else (scale * self.ci95[0], scale * self.ci95[1])
        return _gap(scale * self.gap, within, self.p, form) + ("*" if self.holm < LEVEL else "")


@dataclass
class QualityRow:
    """One arm against the take without it from the same noise, seed by seed: of free takes, and of true beginnings that
    are continued, whose returns are judged. Lists are by seed."""

    arm: str
    against: str
    skipped: float  # share of steps reused, in free takes …
    continued_skipped: float = 0.0  # … and in continued ones
    psnr: list[float] = field(default_factory=list)  # decibels, free takes; none for the arm compared with
    ssim: list[float] = field(default_factory=list)
    continued_psnr: list[float] = field(default_factory=list)
    continued_ssim: list[float] = field(default_factory=list)
    hits: dict[str, list[list[float]]] = field(default_factory=dict)  # what is read → 0 or 1 for every return
    read: dict[str, Rate] = field(default_factory=dict)  # the same, over all seeds

    @property
    def events(self) -> int:
        return sum(map(len, self.hits.get(READ[0], [])))


@dataclass(kw_only=True)
class FlowCacheReport(Report):
    """Everything `longtake bench flowcache` found."""

    kind: ClassVar[str] = "flowcache"

    speed: list[SpeedRow] = field(default_factory=list)
    quality: list[QualityRow] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)

    def own_lines(self) -> list[str]:
        lines = []
        for row in self.speed:
            told = f"{row.model}, {row.arm}: {row.median:.4g} s"
            if row.skipped is not None:
                told += f", {row.skipped:.0%} of steps reused"
            if row.predicted is not None:
                told += f", shapes say {row.predicted:.4g} s ({row.predicted / row.median - 1:+.1%})"
            lines.append(told)
        for q in self.quality:
            like = f"PSNR {_mean(q.psnr, '.2f')} dB, SSIM {_mean(q.ssim, '.4f')}, " if q.psnr else ""
            after = f"continued: PSNR {_mean(q.continued_psnr, '.2f')} dB, SSIM {_mean(q.continued_ssim, '.4f')}, "
            read = ", ".join(f"{name} {rate.cell()}" for name, rate in q.read.items())
            share = f"{q.skipped:.1%} reused, continued {q.continued_skipped:.1%}"
            lines.append(f"{q.arm} ({share}): {like}{after if q.psnr else ''}{q.events} returns: {read}")
        lines += [f"{c.measure}: {c.first} less {c.second}: {c.cell()}" for c in self.compared]
        return lines

    def own_tables(self) -> list[str]:
        tables = []
        for model in dict.fromkeys(row.model for row in self.speed):
            rows = [row for row in self.speed if row.model == model]
            by = {row.arm: row for row in rows}
            times = lambda arm, row, by=by: f"{by[arm].median / row.median:.2f} ×" if arm in by else ""
            cells: list[tuple[str, ...]] = [
                (row.arm, f"{row.median:.3g} s", "" if row.skipped is None else f"{row.skipped:.0%}",
                 times(PIPELINE, row), times("none", row),
                 "" if row.predicted is None else f"{row.predicted / row.median - 1:+.1%}")
                for row in rows
            ]  # fmt: skip
            head: tuple[str, ...] = (
                model,
                "take",
                "steps reused",
                "vs diffusers",
                "vs none",
                "forwards by shape, less measured",
            )
            tables.append(table(head, cells))
        if self.quality:
            cells = [
                (q.arm, f"{q.skipped:.1%}, {q.continued_skipped:.1%}", _mean(q.psnr, ".1f"), _mean(q.ssim, ".3f"),
                 _mean(q.continued_psnr, ".1f"), _mean(q.continued_ssim, ".3f"),
                 *(q.read[name].cell() if name in q.read else "" for name in READ))
                for q in self.quality
            ]  # fmt: skip
            head = (
                "arm", "steps reused, continued", "PSNR, dB", "SSIM", "PSNR continued", "SSIM continued",
                *(f"{name} (less none)" for name in READ),
            )  # fmt: skip
            tables.append(table(head, cells))
        if self.compared:
            measures = list(dict.fromkeys(c.measure for c in self.compared))
            rows_ = dict.fromkeys((c.first, c.second) for c in self.compared)
            found = {(c.first, c.second, c.measure): c.cell() for c in self.compared}
            cells = [
                (f"{first} less {second}", *(found.get((first, second, m), "") for m in measures))
                for first, second in rows_
            ]
            tables.append(table((f"paired by seed; *: p < {LEVEL} after Holm, by column", *measures), cells))
        return tables

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)}


def draw(report: FlowCacheReport) -> bytes:
    """Seconds of a take by arm and model; likeness against the share of steps reused."""
    models = list(dict.fromkeys(row.model for row in report.speed))
    figure, axes = canvas(4.6 * max(1, len(models) + bool(report.quality)), 4.2, 1, len(models) + bool(report.quality))
    plots = list(np.atleast_1d(axes))
    for place, model in zip(plots, models, strict=False):
        rows = [row for row in report.speed if row.model == model][::-1]
        at = range(len(rows))
        place.barh(at, [row.median for row in rows], color=[PALE if row.skipped is None else INK for row in rows])
        known = [(i, row.predicted) for i, row in enumerate(rows) if row.predicted is not None]
        place.plot([p for _, p in known], [i for i, _ in known], "|", color=ACCENT, markersize=10, markeredgewidth=2)
        place.set_yticks(list(at), [row.arm for row in rows], fontsize=7)
        place.set(xlabel="seconds a take; mark: forwards by shape", title=model)
    if report.quality:
        for q in report.quality:
            if q.psnr:
                colour = ACCENT if "teacache" in q.arm else PALE if "carry" in q.arm else INK
                plots[-1].plot(100 * q.skipped, np.mean(q.psnr), "o", color=colour)
                plots[-1].annotate(q.arm, (100 * q.skipped, float(np.mean(q.psnr))), fontsize=6, xytext=(4, 2),
                                   textcoords="offset points")  # fmt: skip
        plots[-1].set(xlabel="steps reused, %", ylabel="PSNR against no reuse, dB")
    return png(figure, f"FlowCache, {report.caption()}")


def known(interval: tuple[float, float]) -> Interval:
    """None for an interval of nothing."""
    return None if any(map(math.isnan, interval)) else interval


def _mean(values: list[float], form: str) -> str:
    """With its interval over seeds."""
    if not values:
        return ""
    return f"{np.mean(values):{form}}{_within(known(interval(dict(enumerate([v] for v in values)))), form)}"


def _within(ci95: Interval, form: str) -> str:
    return "" if ci95 is None else f" [{ci95[0]:{form}}, {ci95[1]:{form}}]"


def _percent(ci95: Interval) -> Interval:
    return None if ci95 is None else (100 * ci95[0], 100 * ci95[1])


def _gap(gap: float, ci95: Interval, p: float, form: str = "+.0f") -> str:
    return f"{gap:{form}}{_within(ci95, form)}, p {p:.2g}"
