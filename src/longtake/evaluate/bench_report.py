"""The answer of a benchmark: figures, counts, curves and targets with their provenance, as JSON and as a picture."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import LongtakeError
from .measure import Figure
from .provenance import BUSY_LIMIT, read_json, write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Target:
    """A promise and whether it was kept; `met` is None, with the reason in `note`, when this run cannot tell."""

    name: str
    limit: str
    found: str
    met: bool | None
    note: str = ""

    def line(self) -> str:
        """For people."""
        word = {True: "met", False: "NOT MET", None: "not judged"}[self.met]
        return f"{word:>10}  {self.name} {self.limit}: {self.found}" + (f" ({self.note})" if self.note else "")


@dataclass
class Curve:
    """Cost of each chunk of a take from its beginning: `chunk_ms` and `outside_ms` (outside the model's forwards) by
    run and chunk, `attended` tokens by chunk."""

    chunk_ms: list[list[float]]
    outside_ms: list[list[float]]
    attended: list[int]


@dataclass
class TakeReport:
    """Everything `longtake bench take` found. Missing figures say why."""

    command: str
    forced: bool
    shape: dict[str, Any]
    settings: dict[str, Any]  # device, dtype, threads, chunks, pairs, …
    provenance: dict[str, Any]
    others_busy: dict[str, float | None]  # share of the machine used by other processes, before and during the run
    figures: list[Figure] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)  # exact numbers at the early and the late chunk
    curves: dict[str, Curve] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)  # what this run could not do at all

    def figure(self, name: str) -> Figure:
        return next(f for f in self.figures if f.name == name)

    def as_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["figures"] = [f.as_dict() for f in self.figures]
        own["curves"] = {name: asdict(curve) for name, curve in self.curves.items()}
        own["targets"] = [asdict(t) for t in self.targets]
        return {"schema": SCHEMA, "benchmark": "take", **own}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        """Raises LongtakeError for another benchmark or schema."""
        kind, schema = data.get("benchmark"), data.get("schema")
        if kind != "take" or schema != SCHEMA:
            raise LongtakeError(f"benchmark {kind!r} of schema {schema}: this version reads 'take', schema {SCHEMA}")
        own = {f.name: data[f.name] for f in fields(cls)}
        own["figures"] = [Figure.read(row) for row in own["figures"]]
        own["curves"] = {name: Curve(**curve) for name, curve in own["curves"].items()}
        own["targets"] = [Target(**row) for row in own["targets"]]
        return cls(**own)

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls.of(read_json(path))

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """`stem`.json and `stem`.png in `folder`, each whole or not at all. Raises LongtakeError."""
        data, picture = folder / f"{stem}.json", folder / f"{stem}.png"
        write_atomically(data, (_compact(self.as_dict()) + "\n").encode())
        write_atomically(picture, draw(self))
        return data, picture

    def text(self) -> str:
        """For people: one line per figure and per target."""
        lines = []
        for f in self.figures:
            if f.median is None or f.ci95 is None:
                lines.append(f"{f.name}: missing, {f.missing}")
            else:
                low, high = f.ci95
                lines.append(f"{f.name}: {f.median:.4g} {f.unit}".rstrip() + f"  [{low:.4g}, {high:.4g}]  n={f.n}")
        words = {True: "met", False: "NOT MET", None: "not judged"}
        for t in self.targets:
            lines.append(f"{words[t.met]:>10}  {t.name} {t.limit}: {t.found}" + (f" ({t.note})" if t.note else ""))
        busy = self.others_busy["during"]
        share = "an unknown part" if busy is None else f"{busy:.0%}"
        lines.append(f"other processes used {share} of the machine meanwhile")
        return "\n".join(lines)

    def markdown(self) -> str:
        """For a README: what was promised and found, and where."""
        words = {True: "kept", False: "**not kept**", None: "not judged"}
        machine, versions = self.provenance["machine"], self.provenance["versions"]
        commit = (self.provenance["git"] or {}).get("commit", "unknown")[:10]
        rows = [f"| {t.name} | {t.limit} | {t.found} | {words[t.met]} |" for t in self.targets]
        rows += [f"| {row['shape']} | | missing: {row['reason']} | |" for row in self.missing]
        threads = f"{self.settings['threads']} threads"
        where = (
            f"`{self.command}`: shape {self.shape['name']}, {self.settings['dtype']}, {threads}, "
            f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, "
            f"{self.provenance['date'][:10]}, commit {commit}."
        )
        return "\n".join(["| what | promised | found | |", "|---|---|---|---|", *rows, "", where])


MARKS = ("<!-- bench:take -->", "<!-- /bench:take -->")


def fill(text: str, table: str) -> str:
    """A document with the table between its marks. Raises LongtakeError if it has none."""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise LongtakeError(f"the document has no {MARKS[0]} … {MARKS[1]}: put the two lines where the table belongs")
    return f"{before}{begin}\n{table}\n{end}{after}"


def draw(report: TakeReport) -> bytes:
    """PNG: milliseconds per chunk, and those outside the forwards, against the chunk's number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = canvas.subplots(1, 2)
    for (name, curve), colour in zip(report.curves.items(), ("#c2571a", "#1f6f8b"), strict=False):
        for axes, runs in ((left, curve.chunk_ms), (right, curve.outside_ms)):
            if not runs:
                continue
            rows = np.asarray(runs)
            number = np.arange(1, rows.shape[1] + 1)
            axes.plot(number, np.median(rows, 0), color=colour, lw=1.6, label=name)
            if len(rows) > 1:
                axes.fill_between(number, rows.min(0), rows.max(0), color=colour, alpha=0.15, lw=0)
    left.set(title="one chunk, decoding apart", xlabel="chunk", ylabel="ms per chunk")
    right.set(title="of it outside the model's forwards", xlabel="chunk", ylabel="ms per chunk")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    machine, settings = report.provenance["machine"], report.settings
    where = machine["gpu"] or f"{machine['cpu']}, torch threads {settings['threads']}"
    runs_note = f"median and range of {settings['repeats']} runs" if settings["repeats"] > 1 else "one run"
    busy = report.others_busy["during"]
    forced = f" (others used {busy:.0%} of the machine)" if busy is not None and busy > BUSY_LIMIT else ""
    canvas.suptitle(f"{report.shape['name']} on {where}, {settings['dtype']}: {runs_note}{forced}", fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(canvas).print_png(buffer)
    return buffer.getvalue()


def _compact(value: Any, indent: str = "") -> str:
    """JSON with lists of plain values on one line each: the file is read by people, too."""
    nested = (dict, list, tuple)
    inner = indent + "  "
    if isinstance(value, dict) and value:
        rows = (f"{inner}{json.dumps(str(k))}: {_compact(v, inner)}" for k, v in value.items())
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, nested) for v in value):
        return "[\n" + ",\n".join(inner + _compact(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
