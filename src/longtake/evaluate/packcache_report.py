"""The answer of `longtake bench packcache`: seconds and bytes per frame of every arm, ratios, and predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .bench_report import Report, Target, table
from .canvas import ACCENT, INK, PALE, canvas, from_zero, png

RATIO_3B, TOLERANCE = 2.85, 0.05  # attention : linear FLOPs of the 3B model at latent frame 13
LINEAR = 0.98  # least R² of the cost per frame against the keys it attends to
FLAT = 1.05  # most that a packed frame may cost at the end against the first one with a full window


@dataclass
class ArmRun:
    """One arm, by generated frame: its seconds, had all its forwards taken what its median forward took (they are equal
    work, and a machine's hiccups are not the arm's); the seconds by the clock; bytes of K/V in use after it, and most
    bytes allocated during it, spare rows and the view among them (None: not known)."""

    seconds: list[float] = field(default_factory=list)
    clock_seconds: list[float] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)
    peak_bytes: list[int | None] = field(default_factory=list)

    @property
    def peak(self) -> int | None:
        """Most bytes allocated during any frame."""
        return max((found for found in self.peak_bytes if found is not None), default=None)


@dataclass
class Ratio:
    """Seconds of a baseline over those of the packed history: of the whole take of so many pixel frames, and of its
    last latent frame; `counted` and `predicted` are (whole, last) by FLOPs, and by the timed forwards."""

    pixel_frames: int
    latent_frames: int
    baseline: str
    end_to_end: float
    last_frame: float
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
                rows.append(
                    Target(f"{name}: cost of a frame grows linearly, R²", f"≥ {LINEAR}", f"{r2:.4f}", r2 >= LINEAR)
                )
        if self.busy:
            note = f"other processes used {self.others_busy['during']:.0%} of the machine during the run"
            rows = [rows[0], *(Target(t.name, t.limit, t.found, None, note) for t in rows[1:])]
        self.targets = rows

    def own_lines(self) -> list[str]:
        """The mask-free ratios are the ones that say what packing saves."""
        lines = [
            f"{'pixel frames':>12} {'baseline':14} {'whole take':>10} {'last frame':>10}   {'counted':13} predicted"
        ]
        for r in sorted(self.ratios, key=lambda r: r.baseline != "mask-free"):
            lines.append(
                f"{r.pixel_frames:>12} {r.baseline:14} {r.end_to_end:>10.2f} {r.last_frame:>10.2f}   "
                f"{_pair(r.counted):13} {_pair(r.predicted)}"
            )
        for name, arm in self.arms.items():
            peak = "peak not known" if arm.peak is None else f"{arm.peak / 1e6:.1f} MB at the peak"
            lines.append(
                f"{name}: {sum(arm.seconds):.1f} s ({sum(arm.clock_seconds):.1f} by the clock), "
                f"{arm.seconds[0]:.3f} → {arm.seconds[-1]:.3f} s a frame, "
                f"{arm.held_bytes[-1] / 1e6:.1f} MB held at the end, {peak}"
            )
        if (e := self.calibration["e"]) is not None:
            lines.append(f"an attention FLOP takes {e:.2f} times as long as one of a matrix product here")
        return lines

    def own_tables(self) -> list[str]:
        head = ("pixel frames", "latent frames", "faster than", "whole take", "last frame", "by FLOPs", "by timing")
        rows = [
            (str(r.pixel_frames), str(r.latent_frames), r.baseline, f"{r.end_to_end:.2f}", f"{r.last_frame:.2f}",
             _pair(r.counted), _pair(r.predicted))
            for r in sorted(self.ratios, key=lambda r: r.baseline != "mask-free")
        ]  # fmt: skip
        arms = [
            (name, f"{sum(arm.seconds):.1f} s", f"{sum(arm.clock_seconds):.1f} s",
             f"{arm.seconds[0]:.3f} → {arm.seconds[-1]:.3f} s", f"{arm.held_bytes[-1] / 1e6:.1f} MB",
             "" if arm.peak is None else f"{arm.peak / 1e6:.1f} MB")
            for name, arm in self.arms.items()
        ]  # fmt: skip
        columns = ("arm", "whole take", "by the clock", "first → last frame", "K/V held at the end", "most memory")
        return [table(head, rows), table(columns, arms)]

    def pictures(self) -> dict[str, bytes]:
        return {"": draw(self)}


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
        if all(p is not None for p in arm.peak_bytes):
            right.plot(frame, np.asarray(arm.peak_bytes, float) / 1e6, color=colour, lw=0.8, ls=":")
    left.set(title="one latent frame", xlabel="latent frame", ylabel="seconds")
    right.set(title="K/V in use (dotted: allocated at the peak)", xlabel="latent frame", ylabel="MB")
    from_zero(left, right)
    return png(figure, f"{report.caption()}, {report.settings['steps']} steps")
