"""What `longtake bench peers` found: both sides of every pair beside the common fields, their table and picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .bench_report import Report, table
from .canvas import ACCENT, INK, canvas, from_zero, png


@dataclass
class Run:
    """One run of one side, by chunk or as a whole; see `Side`."""

    seconds: list[float]
    attended: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    held_bytes: int | None = None


@dataclass
class Side:
    """One side of a pair: seconds by repeat and chunk, and by chunk what it attended to (keys) and computed (FLOPs);
    bytes of K/V at the end. A side that cannot be told chunk by chunk has one entry for all of it."""

    what: str
    seconds: list[list[float]] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    held_bytes: int | None = None

    @property
    def whole(self) -> list[float]:
        """Seconds of all chunks, by repeat."""
        return [sum(run) for run in self.seconds]

    @property
    def last(self) -> list[float]:
        return [run[-1] for run in self.seconds]

    def note(self, run: Run) -> None:
        self.seconds.append(run.seconds)
        self.attended, self.flops, self.held_bytes = run.attended, run.flops, run.held_bytes


@dataclass
class Pair:
    """A peer and ours."""

    peer: str
    theirs: Side
    ours: Side


@dataclass(kw_only=True)
class PeersReport(Report):
    """Everything `longtake bench peers` found."""

    kind: ClassVar[str] = "peers"

    pairs: list[Pair] = field(default_factory=list)

    def own_tables(self) -> list[str]:
        head = ("peer", "ours", "peer: all, last", "ours: all, last", "tokens at the end", "K/V held", "peer / ours")
        rows = []
        for p in self.pairs:
            ratio = self.figure(f"{p.peer}: peer / ours, whole")
            assert ratio.median is not None and ratio.ci95 is not None
            both = lambda of, p=p: f"{of(p.theirs)} : {of(p.ours)}"
            rows.append((
                f"{p.peer}: {p.theirs.what}", p.ours.what, _times(p.theirs), _times(p.ours),
                both(lambda s: str(s.attended[-1]) if s.attended else "—"), both(_held),
                f"**{ratio.median:.2f}** [{ratio.ci95[0]:.2f}, {ratio.ci95[1]:.2f}]",
            ))  # fmt: skip
        return [table(head, rows)]

    def figure_rows(self) -> list[tuple[str, ...]]:
        return []  # they are in the table

    def own_lines(self) -> list[str]:
        return [
            f"{p.peer}: {p.theirs.what} against {p.ours.what}: {_times(p.theirs)} against {_times(p.ours)}, "
            f"{_held(p.theirs)} against {_held(p.ours)} held"
            for p in self.pairs
        ]

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)} if self.pairs else {}


def _times(side: Side) -> str:
    whole, last = float(np.median(side.whole)), float(np.median(side.last))
    return f"{whole:.3g} s" if len(side.seconds[0]) == 1 else f"{whole:.3g} s, {1e3 * last:.3g} ms"


def _held(side: Side) -> str:
    return "—" if side.held_bytes is None else f"{side.held_bytes / 1e6:.3g} MB"


def draw(report: PeersReport) -> bytes:
    """PNG: milliseconds of every chunk, a panel for each pair that can be told chunk by chunk (else for the first)."""
    shown = [p for p in report.pairs if len(p.theirs.seconds[0]) > 1] or report.pairs[:1]
    figure, panels = canvas(3.4 * len(shown), 3.4, 1, len(shown))
    for axes, pair in zip(np.atleast_1d(panels), shown, strict=True):
        for side, colour, name in ((pair.theirs, ACCENT, pair.peer), (pair.ours, INK, "ours")):
            rows = 1e3 * np.asarray(side.seconds)
            axes.plot(np.arange(1, rows.shape[1] + 1), np.median(rows, 0), color=colour, lw=1.5, label=name)
        axes.set(title=pair.peer, xlabel="chunk", ylabel="ms per chunk")
        from_zero(axes)
    return png(figure, f"{report.caption()}, equal {report.settings['match']}")
