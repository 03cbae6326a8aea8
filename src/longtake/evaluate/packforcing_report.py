"""What `longtake bench packforcing` found: the takes' courses beside the common fields, and their picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .bench_report import Report, table
from .canvas import canvas, from_zero, png


@dataclass
class Course:
    """A take chunk by chunk: seconds in all, outside the model's forwards and of compressing; tokens and bytes."""

    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)
    history_bytes: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class PackForcingReport(Report):
    """Everything `longtake bench packforcing` found; `courses` by name of the take."""

    kind: ClassVar[str] = "packforcing"

    courses: dict[str, Course] = field(default_factory=dict)

    def own_lines(self) -> list[str]:
        return [f"{name.replace('_', ' ')}: {value}" for name, value in self.counts.items()]

    def own_tables(self) -> list[str]:
        rows = [
            (name, str(len(c.seconds)), f"{1e3 * c.seconds[-1]:.4g} ms", str(c.attended[-1]),
             f"{c.history_bytes[-1] / 1e6:.1f} MB")
            for name, c in self.courses.items()
        ]  # fmt: skip
        return [table(("take", "chunks", "last chunk", "tokens attended", "K/V held"), rows)]

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)}


def draw(report: PackForcingReport) -> bytes:
    """Time and attended tokens by chunk, as a PNG."""
    figure, (times, tokens) = canvas(9, 3.6, 1, 2)
    for name, course in report.courses.items():
        chunks = range(1, len(course.seconds) + 1)
        times.plot(chunks, [1e3 * s for s in course.seconds], label=name, linewidth=1)
        tokens.plot(chunks, course.attended, label=name, linewidth=1)
    times.set(xlabel="chunk", ylabel="ms per chunk")
    tokens.set(xlabel="chunk", ylabel="tokens attended")
    from_zero(times, tokens)
    return png(figure, f"PackForcing, {report.caption()}")
