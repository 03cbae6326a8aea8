"""The answer of `longtake bench packcache`: seconds and bytes of every arm, ratios with intervals, and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar

import numpy as np

from .bench_report import Report, Target, table
from .canvas import ACCENT, INK, PALE, canvas, from_zero, png

RATIO_3B, TOLERANCE = 2.85, 0.05  # attention : linear FLOPs of the 3B model at latent frame 13
LINEAR = 0.98  # least R² of the cost per frame against the keys it attends to
FLAT = 1.05  # most that a packed frame may cost at the end against the first one with a full window


@dataclass
class Peak:
    """Bytes of a take of so many latent frames at its last one: held before it (history, view, masks, prompt; no
    weights), and the most that is alive besides within it. None: not known, or not reached."""

    latent_frames: int
    allocated: int | None = None
    transient: int | None = None

    @property
    def total(self) -> int | None:
        return None if self.allocated is None or self.transient is None else self.allocated + self.transient


@dataclass
class ArmRun:
    """One arm, by generated frame: its seconds, had all its forwards taken what its median forward took (they are equal
    work, and a machine's hiccups are not the arm's); the seconds by the clock; of these, the counted forwards, how many
    were made, and the seconds between them; and bytes of K/V in use after it."""

    seconds: list[float] = field(default_factory=list)
    clock_seconds: list[float] = field(default_factory=list)
    forwards: list[list[float]] = field(default_factory=list)
    forward_counts: list[int] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)

    def add(self, clock_seconds: float, forwards: Sequence[float], skipped: int = 0) -> None:
        """A frame; its first `skipped` forwards are not counted."""
        between = clock_seconds - sum(forwards)
        self.seconds.append(between + len(forwards) * median(forwards[skipped:]))
        self.clock_seconds.append(clock_seconds)
        self.forwards.append(list(forwards[skipped:]))
        self.forward_counts.append(len(forwards))
        self.between.append(between)


@dataclass
class Ratio:
    """Seconds of a baseline over those of the packed history: of the whole take of so many pixel frames, and of its
    last latent frame, with 95 % intervals; and both by the plain clock. `counted` and `predicted` are (whole, last) by
    FLOPs, and by the timed forwards."""

    pixel_frames: int
    latent_frames: int
    baseline: str
    end_to_end: float
    last_frame: float
    end_to_end_ci95: tuple[float, float]
    last_frame_ci95: tuple[float, float]
    by_clock: tuple[float, float]
    counted: tuple[float, float] | None = None
    predicted: tuple[float, float] | None = None


@dataclass(kw_only=True)
class PackReport(Report):
    """Everything `longtake bench packcache` found."""

    kind: ClassVar[str] = "packcache"

    calibration: dict[str, Any]
    arms: dict[str, ArmRun]
    ratios: list[Ratio] = field(default_factory=list)

    def judge(self) -> None:
        """Set `targets`: what a run must show to mean anything, and whether it did."""
        own, window = self.settings["policy"], self.settings["policy_options"].get("max_frames", 4)
        found = self.shape["attention_to_linear_flops_at_13"]
        rows = [
            Target(
                "attention : linear FLOPs at latent frame 13", f"{RATIO_3B} ± {TOLERANCE:.0%}", f"{found:.3f}",
                abs(found / RATIO_3B - 1) <= TOLERANCE,
            )
        ]  # fmt: skip
        for name, arm in self.arms.items():
            seconds = np.asarray(arm.seconds)
            if not len(seconds):
                continue
            if name == own:
                full = seconds[window:]
                if len(full) < 4:
                    rows.append(Target(f"{name}: last / first packed frames", f"≤ {FLAT}", "", None, "too short"))
                    continue
                part = max(1, len(full) // 4)
                flat = float(np.median(full[-part:]) / np.median(full[:part]))
                rows.append(Target(f"{name}: last / first packed frames", f"≤ {FLAT}", f"{flat:.3f}", flat <= FLAT))
                bytes_equal = len(set(arm.held_bytes[window:])) == 1
                span = f"{min(arm.held_bytes[window:])} … {max(arm.held_bytes[window:])}"
                rows.append(Target(f"{name}: bytes held once full", "constant", span, bytes_equal))
            elif len(seconds) >= 4:
                frames = np.arange(len(seconds))
                r2 = float(np.corrcoef(frames, seconds)[0, 1] ** 2)
                slope = float(np.polyfit(frames, seconds, 1)[0])
                rows.append(
                    Target(
                        f"{name}: cost of a frame grows linearly, R² and slope", f"≥ {LINEAR}, > 0 s a frame",
                        f"{r2:.4f}, {slope:+.4g}", bool(r2 >= LINEAR and slope > 0),
                    )
                )  # fmt: skip
        if self.busy:
            note = f"other processes used {self.others_busy['during']:.0%} of the machine during the run"
            rows = [rows[0], *(Target(t.name, t.limit, t.found, None, note) for t in rows[1:])]
        self.targets = rows

    def own_lines(self) -> list[str]:
        """The mask-free ratios are the ones that say what packing saves."""
        lines = [
            f"{'pixel frames':>12} {'baseline':14} {'whole take':>20} {'last frame':>20}   {'by the clock':14} "
            f"{'counted':13} predicted"
        ]
        for r in self._sorted():
            lines.append(
                f"{r.pixel_frames:>12} {r.baseline:14} {_with(r.end_to_end, r.end_to_end_ci95):>20} "
                f"{_with(r.last_frame, r.last_frame_ci95):>20}   {_pair(r.by_clock):14} {_pair(r.counted):13} "
                f"{_pair(r.predicted)}"
            )
        for name, arm in self.arms.items():
            if not arm.seconds:
                continue
            peaks = ", ".join(f"{_mb(p.total)} at {p.latent_frames} latent frames" for p in arm.peaks)
            lines.append(
                f"{name}: {sum(arm.seconds):.1f} s ({sum(arm.clock_seconds):.1f} by the clock), "
                f"{arm.seconds[0]:.3f} → {arm.seconds[-1]:.3f} s a frame, "
                f"{arm.held_bytes[-1] / 1e6:.1f} MB of K/V held at the end; peak without weights {peaks}"
            )
        masks = ", ".join(f"{_mb(b)} at {n} pixel frames" for n, b in self.counts["authors_mask_bytes"].items())
        lines.append(f"the authors' own mask, tokens × tokens, would take besides while it is built: {masks}")
        if (e := self.calibration["e"]) is not None:
            lines.append(f"an attention FLOP takes {e:.2f} times as long as one of a matrix product here")
        return lines

    def own_tables(self) -> list[str]:
        head = ("pixel frames", "latent frames", "faster than", "whole take", "last frame", "by the clock", "by FLOPs",
                "by timing")  # fmt: skip
        rows = [
            (str(r.pixel_frames), str(r.latent_frames), r.baseline, _with(r.end_to_end, r.end_to_end_ci95),
             _with(r.last_frame, r.last_frame_ci95), _pair(r.by_clock), _pair(r.counted), _pair(r.predicted))
            for r in self._sorted()
        ]  # fmt: skip
        arms = [
            (name, f"{sum(arm.seconds):.1f} s", f"{sum(arm.clock_seconds):.1f} s",
             f"{arm.seconds[0]:.3f} → {arm.seconds[-1]:.3f} s", f"{arm.held_bytes[-1] / 1e6:.1f} MB")
            for name, arm in self.arms.items() if arm.seconds
        ]  # fmt: skip
        columns = ("arm", "whole take", "by the clock", "first → last frame", "K/V held at the end")
        return [table(head, rows), table(columns, arms), self._memory()]

    def _memory(self) -> str:
        """Peak memory of every arm at every length, what is held and what the last frame adds."""
        masks = self.counts["authors_mask_bytes"]
        pixels = self.settings["pixel_frames"]
        rows = []
        for name, arm in self.arms.items():
            cells = [f"{_mb(p.total)} ({_mb(p.allocated)} + {_mb(p.transient)})" for p in arm.peaks]
            rows.append((name, *(cells or ["not reached"] * len(pixels))))
        rows.append(("the authors' L × L mask, besides", *(_mb(masks[str(n)]) for n in pixels)))
        weights = _mb(self.counts["weight_bytes"])
        head = (f"peak memory without the {weights} of weights (held + within a frame)", *map(str, pixels))
        return table(head, rows)

    def _sorted(self) -> list[Ratio]:
        return sorted(self.ratios, key=lambda r: r.baseline != "mask-free")

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)}


def _with(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _mb(found: int | None) -> str:
    return "not known" if found is None else f"{found / 1e6:.1f} MB"


def _pair(found: tuple[float, float] | None) -> str:
    """Of the whole take, and of its last frame."""
    return "—" if found is None else f"{found[0]:.2f} / {found[1]:.2f}"


def draw(report: PackReport) -> bytes:
    """PNG: seconds of every latent frame, and bytes held."""
    figure, (left, right) = canvas(9, 3.6, 1, 2)
    for (name, arm), colour in zip(report.arms.items(), (INK, ACCENT, PALE), strict=False):
        frame = np.arange(1, len(arm.seconds) + 1)
        left.plot(frame, arm.seconds, color=colour, lw=1.5, label=name)
        right.plot(frame, np.asarray(arm.held_bytes) / 1e6, color=colour, lw=1.5, label=name)
        known = [(p.latent_frames - 1, p.total / 1e6) for p in arm.peaks if p.total is not None]
        right.plot(*zip(*known, strict=True), "o", color=colour, ms=4) if known else None
    left.set(title="one latent frame", xlabel="latent frame", ylabel="seconds")
    right.set(title="K/V in use (dots: peak of a take of that length)", xlabel="latent frame", ylabel="MB")
    from_zero(left, right)
    return png(figure, f"{report.caption()}, {report.settings['steps']} steps")
