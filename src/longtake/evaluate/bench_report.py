"""What every benchmark answers with: one schema for all, with provenance, ceilings, targets, and a reason for whatever
is missing.

A benchmark adds fields of its own by subclassing `Report`; reading, writing, the text for people and the table for
documents come with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import LongtakeError
from .measure import Figure
from .provenance import BUSY_LIMIT, read_json, write_report
from .roofline import Ceilings
from .typed import record

SCHEMA = 2


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


@dataclass(frozen=True)
class Missing:
    """Something this run could not do at all, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Reached:
    """How near to the machine's ceiling something came. `rate` is in TFLOP/s, or GB/s (read and written) for "copy"."""

    what: str
    resource: str  # a dtype of `gemm_tflops`, or "copy"
    rate: float
    share: float | None  # of the ceiling; None where it was not measured

    @property
    def unit(self) -> str:
        return "GB/s" if self.resource == "copy" else "TFLOP/s"

    def line(self) -> str:
        """For people."""
        share = "its ceiling is not known" if self.share is None else f"{self.share:.0%} of {self.resource}'s ceiling"
        return f"{self.what}: {self.rate:.4g} {self.unit}, {share}"


@dataclass(kw_only=True)
class Report:
    """The fields that all benchmarks share."""

    kind: ClassVar[str] = ""  # name of the benchmark

    command: str
    forced: bool
    shape: dict[str, Any]
    settings: dict[str, Any]  # device, dtype, threads, …
    provenance: dict[str, Any]
    others_busy: dict[str, float | None]  # share of the machine used by other processes, before and during the run
    ceilings: Ceilings | None = None  # of this machine, measured right before
    figures: list[Figure] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)  # exact numbers
    reached: list[Reached] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def figure(self, name: str) -> Figure:
        return next(f for f in self.figures if f.name == name)

    @property
    def busy(self) -> bool:
        """Others used so much of the machine that times mean little."""
        during = self.others_busy["during"]
        return during is not None and during > BUSY_LIMIT

    def reach(self, what: str, resource: str, rate: float) -> None:
        """Note a rate, in TFLOP/s or (for "copy") GB/s, with its share of the ceiling."""
        ceiling = None if self.ceilings is None else self.ceilings.of(resource)
        self.reached.append(Reached(what, resource, rate, None if ceiling is None else rate / ceiling))

    # --- files --------------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"schema": SCHEMA, "benchmark": self.kind, **_plain(own)}

    @classmethod
    def of(cls, data: Any) -> Self:
        """Raises LongtakeError for another benchmark or schema, and for a file that is not as the schema says."""
        if not isinstance(data, dict):
            raise LongtakeError("a benchmark's file is one JSON object")
        kind, schema = data.get("benchmark"), data.get("schema")
        if kind != cls.kind or schema != SCHEMA:
            raise LongtakeError(
                f"benchmark {kind!r} of schema {schema}: this version reads {cls.kind!r}, schema {SCHEMA}"
            )
        return record(cls, {k: v for k, v in data.items() if k not in ("schema", "benchmark")})

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            return cls.of(read_json(path))
        except LongtakeError as error:
            raise LongtakeError(f"{path}: {error}") from None

    def write(self, folder: Path, stem: str) -> list[Path]:
        """`stem`.json and its pictures in `folder`, each whole or not at all. Raises LongtakeError."""
        return write_report(folder, stem, _compact(self.as_dict()), self.pictures())

    def pictures(self) -> dict[str, bytes]:
        """PNG bytes by name; "" is named like the JSON itself."""
        return {}

    # --- for people ---------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """For people: a line for everything that was found, judged or missing."""
        busy = self.others_busy["during"]
        share = "an unknown part" if busy is None else f"{busy:.0%}"
        return "\n".join([
            *(f.line() for f in self.figures), *self.own_lines(), *(r.line() for r in self.reached),
            *(t.line() for t in self.targets), *(f"{m.what}: missing, {m.reason}" for m in self.missing),
            f"other processes used {share} of the machine meanwhile",
        ])  # fmt: skip

    def own_lines(self) -> list[str]:
        """What a benchmark's own fields say, for `text`."""
        return []

    def markdown(self) -> str:
        """For a document: tables of everything, and where it was measured."""
        parts = self.own_tables()
        if rows := self.figure_rows():
            parts.append(table(("what", "median", "95 % interval", "n"), rows))
        parts += reached_table(self)
        if self.targets:
            rows = [(t.name, t.limit, t.found, KEPT[t.met]) for t in self.targets]
            parts.append(table(("what", "promised", "found", ""), rows))
        if self.missing:
            parts.append(table(("missing", "reason"), [(m.what, m.reason) for m in self.missing]))
        return "\n\n".join([*parts, self.where()])

    def own_tables(self) -> list[str]:
        """What a benchmark's own fields say, for `markdown`."""
        return []

    def figure_rows(self) -> list[tuple[str, ...]]:
        """Rows of figures: name, median, interval, n."""
        rows: list[tuple[str, ...]] = []
        for f in self.figures:
            if f.median is None or f.ci95 is None:
                rows.append((f.name, "missing", f.missing, ""))
            else:
                low, high = f.ci95
                rows.append((f.name, f"{f.median:.4g} {f.unit}".rstrip(), f"{low:.4g} … {high:.4g}", str(f.n)))
        return rows

    def caption(self) -> str:
        """Shape, device and dtype: what stands above a picture."""
        machine, settings = self.provenance["machine"], self.settings
        where = machine["gpu"] or f"{machine['cpu']}, torch threads {settings['threads']}"
        during = self.others_busy["during"]
        forced = f" (others used {during:.0%} of the machine)" if self.busy and during is not None else ""
        return f"{self.shape['name']} on {where}, {settings['dtype']}{forced}"

    def where(self) -> str:
        """The command, and what it ran on."""
        machine, versions = self.provenance["machine"], self.provenance["versions"]
        commit = (self.provenance["git"] or {}).get("commit", "unknown")[:10]
        threads = f"{self.settings['threads']} threads"
        forced = " Measured on a busy machine." if self.busy else ""
        return (
            f"`{self.command}`: shape {self.shape['name']}, {self.settings['dtype']}, {threads}, "
            f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, "
            f"{self.provenance['date'][:10]}, commit {commit}.{forced}"
        )


KEPT = {True: "kept", False: "**not kept**", None: "not judged"}


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown."""

    def line(cells: Sequence[str]) -> str:
        escaped = [cell.replace("|", r"\|") for cell in cells]
        return f"| {' | '.join(escaped)} |".replace("|  |", "| |")

    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def reached_table(report: Report) -> list[str]:
    """Markdown of what was reached of the ceilings, if anything was."""
    rows = [
        (r.what, f"{r.rate:.3g} {r.unit}", r.resource, "not known" if r.share is None else f"{r.share:.0%}")
        for r in report.reached
    ]
    return [table(("against this machine's ceiling", "reached", "ceiling of", "share"), rows)] if rows else []


def _plain(value: Any) -> Any:
    """Dataclasses as JSON values; those with a form of their own as that."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


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
