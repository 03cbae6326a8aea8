"""What `longtake bench gpu` answers with. Every row says how it was come by: "run" was timed as a whole, "summed" adds
up forwards that were timed one by one, "missing" was not measured at all, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..bench_report import Report, table


@dataclass(frozen=True)
class ForwardRow:
    """One distinct forward of a model: `seconds` is the median of `n` calls."""

    model: str
    tokens: int
    keys: int
    text: int
    how: str  # "run" or "missing"
    seconds: float | None = None
    n: int = 0
    flops: float | None = None
    reason: str = ""

    @property
    def rate(self) -> float | None:
        """TFLOP/s."""
        return None if not self.seconds or self.flops is None else self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class TotalRow:
    """A take or a chunk of it: `what` says which. Summed ones leave out everything between forwards: view, sampler,
    decoding; `forwards` is how many were added up."""

    model: str
    policy: str
    what: str
    how: str  # "run", "summed" or "missing"
    seconds: float | None = None
    pixel_frames: int | None = None
    forwards: int | None = None
    reason: str = ""

    @property
    def frames_per_second(self) -> float | None:
        return None if not self.seconds or self.pixel_frames is None else self.pixel_frames / self.seconds


@dataclass(frozen=True)
class PathRow:
    """One way of doing one thing: a layer's view and attention, or a chunk."""

    what: str
    way: str
    how: str  # "run" or "missing"
    seconds: float | None = None
    n: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ErrorRow:
    """Attention over a history kept in one form, against the same in fp32: relative, root mean square over all layers,
    and in the worst one."""

    model: str
    form: str
    token_bytes: int  # of one layer and head, K and V
    error: float
    worst_layer: float


@dataclass(kw_only=True)
class GpuReport(Report):
    """Rows by kind; `minutes` is the time it was given."""

    kind: ClassVar[str] = "gpu"

    minutes: float
    forwards: list[ForwardRow] = field(default_factory=list)
    totals: list[TotalRow] = field(default_factory=list)
    paths: list[PathRow] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)

    def own_lines(self) -> list[str]:
        return [
            *(f"{r.model}, {r.tokens} tokens, {r.keys} keys: {_seconds(r)}{_rate(r.rate)}" for r in self.forwards),
            *(f"{r.model} under {r.policy}, {r.what}: {_seconds(r)}" for r in self.totals),
            *(f"{r.what}, {r.way}: {_seconds(r)}" for r in self.paths),
            *(f"attention over {r.form} history of {r.model}: off by {r.error:.2%}" for r in self.errors),
        ]

    def own_tables(self) -> list[str]:
        return [
            table(
                ("model", "tokens", "keys", "how", "seconds", "TFLOP/s"),
                [
                    (r.model, f"{r.tokens}", f"{r.keys}", r.how, _cell(r.seconds, r.reason), _cell(r.rate))
                    for r in self.forwards
                ],
            ),
            table(
                ("model", "policy", "what", "how", "seconds", "frames/s"),
                [
                    (r.model, r.policy, r.what, r.how, _cell(r.seconds, r.reason), _cell(r.frames_per_second))
                    for r in self.totals
                ],
            ),
            table(
                ("what", "way", "how", "seconds"),
                [(r.what, r.way, r.how, _cell(r.seconds, r.reason)) for r in self.paths],
            ),
            table(
                ("model", "history", "bytes of a token, layer and head", "error of attention", "in the worst layer"),
                [(r.model, r.form, f"{r.token_bytes}", f"{r.error:.2%}", f"{r.worst_layer:.2%}") for r in self.errors],
            ),
        ]


def _seconds(row: ForwardRow | TotalRow | PathRow) -> str:
    return f"missing, {row.reason}" if row.seconds is None else f"{row.seconds:.4g} s ({row.how})"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f", {rate:.3g} TFLOP/s"


def _cell(value: float | None, reason: str = "") -> str:
    return reason or "" if value is None else f"{value:.4g}"
