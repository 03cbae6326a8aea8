"""What `longtake bench packforcing` found, as JSON, as text and as a picture."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .measure import Figure
from .provenance import write_atomically

SCHEMA = 1


@dataclass
class Course:
    """A take chunk by chunk: seconds in all, outside the model's forwards and of compressing; tokens and bytes."""

    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)
    history_bytes: list[int] = field(default_factory=list)


@dataclass
class PackForcingReport:
    """Settings, provenance, figures with intervals, exact counts and the takes' courses by name."""

    command: str
    forced: bool
    shape: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    others_busy: dict[str, float | None]
    figures: list[Figure] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    courses: dict[str, Course] = field(default_factory=dict)
    missing: list[dict[str, str]] = field(default_factory=list)  # what this run could not do at all

    def figure(self, name: str) -> Figure:
        return next(f for f in self.figures if f.name == name)

    def as_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["figures"] = [f.as_dict() for f in self.figures]
        own["courses"] = {
            name: {key: [float(f"{x:.6g}") for x in column] for key, column in asdict(course).items()}
            for name, course in self.courses.items()
        }
        return {"schema": SCHEMA, "benchmark": "packforcing", **own}

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """`stem`.json and `stem`.png in `folder`, each whole or not at all. Raises LongtakeError."""
        data, picture = folder / f"{stem}.json", folder / f"{stem}.png"
        write_atomically(data, (json.dumps(self.as_dict(), ensure_ascii=False) + "\n").encode())
        write_atomically(picture, draw(self))
        return data, picture

    def text(self) -> str:
        """For people: one line per figure and count."""
        lines = []
        for f in self.figures:
            if f.median is None or f.ci95 is None:
                lines.append(f"{f.name}: missing, {f.missing}")
            else:
                low, high = f.ci95
                lines.append(f"{f.name}: {f.median:.4g} {f.unit}".rstrip() + f"  [{low:.4g}, {high:.4g}]  n={f.n}")
        lines += [f"{name.replace('_', ' ')}: {value}" for name, value in self.counts.items()]
        lines += [f"{row['shape']}: missing, {row['reason']}" for row in self.missing]
        busy = self.others_busy["during"]
        lines.append(f"other processes used {'an unknown part' if busy is None else f'{busy:.0%}'} of the machine")
        return "\n".join(lines)


def draw(report: PackForcingReport) -> bytes:
    """Time and attended tokens by chunk, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(picture)
    times, tokens = picture.subplots(1, 2)
    for name, course in report.courses.items():
        chunks = range(1, len(course.seconds) + 1)
        times.plot(chunks, [1e3 * s for s in course.seconds], label=name, linewidth=1)
        tokens.plot(chunks, course.attended, label=name, linewidth=1)
    times.set(xlabel="chunk", ylabel="ms per chunk", ylim=(0, None))
    tokens.set(xlabel="chunk", ylabel="tokens attended", ylim=(0, None))
    times.legend(frameon=False)
    picture.suptitle(f"PackForcing, shape {report.shape['name']}, {report.settings['device']}", fontsize=10)
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=120)
    return out.getvalue()
