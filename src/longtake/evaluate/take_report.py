"""What `longtake bench take` found: curves of a take beside the common fields, its table and its picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .bench_report import KEPT, Report, reached_table, table
from .canvas import ACCENT, INK, canvas, from_zero, png


@dataclass
class Curve:
    """Cost of each chunk of a take from its beginning: `chunk_ms` and `outside_ms` (outside the model's forwards) by
    run and chunk, `attended` tokens by chunk."""

    chunk_ms: list[list[float]]
    outside_ms: list[list[float]]
    attended: list[int]


@dataclass(kw_only=True)
class TakeReport(Report):
    """Everything `longtake bench take` found; `counts` are of the early and the late chunk."""

    kind: ClassVar[str] = "take"

    curves: dict[str, Curve] = field(default_factory=dict)

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)}

    def markdown(self) -> str:
        """What was promised and found, and where."""
        rows = [(t.name, t.limit, t.found, KEPT[t.met]) for t in self.targets]
        rows += [(m.what, "", f"missing: {m.reason}", "") for m in self.missing]
        parts = [table(("what", "promised", "found", ""), rows), *reached_table(self), self.where()]
        return "\n\n".join(parts)


def draw(report: TakeReport) -> bytes:
    """PNG: milliseconds per chunk, and those outside the forwards, against the chunk's number."""
    figure, (left, right) = canvas(9, 3.6, 1, 2)
    for (name, curve), colour in zip(report.curves.items(), (ACCENT, INK), strict=False):
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
    from_zero(left, right)
    repeats = report.settings["repeats"]
    how = f"median and range of {repeats} runs" if repeats > 1 else "one run"
    return png(figure, f"{report.caption()}: {how}")
