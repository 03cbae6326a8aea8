"""The answer of `longtake bench packcache`: seconds and bytes per frame of every arm, ratios, and predictions."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bench_report import Target
from .provenance import BUSY_LIMIT, write_atomically

SCHEMA = 1
RATIO_3B, TOLERANCE = 2.85, 0.05  # attention : linear FLOPs of the 3B model at latent frame 13
LINEAR = 0.98  # least R² of the cost per frame against the keys it attends to
FLAT = 1.05  # most that a packed frame may cost at the end against the first one with a full window


@dataclass
class ArmRun:
    """One arm, by generated frame: seconds, bytes of K/V in use after it, and most bytes allocated during it, spare
    rows and the view among them (None: not known)."""

    seconds: list[float] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)
    peak_bytes: list[int | None] = field(default_factory=list)


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


@dataclass
class PackReport:
    command: str
    forced: bool
    shape: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    others_busy: dict[str, float | None]
    calibration: dict[str, Any]
    arms: dict[str, ArmRun]
    ratios: list[Ratio] = field(default_factory=list)

    def targets(self) -> list[Target]:
        """What a run must show to mean anything, and whether it did."""
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
        busy = self.others_busy["during"]
        if busy is not None and busy > BUSY_LIMIT:
            note = f"other processes used {busy:.0%} of the machine during the run"
            rows = [rows[0], *(Target(t.name, t.limit, t.found, None, note) for t in rows[1:])]
        return rows

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "benchmark": "packcache", "command": self.command, "forced": self.forced,
            "shape": self.shape, "settings": self.settings, "provenance": self.provenance,
            "others_busy": self.others_busy, "calibration": self.calibration,
            "ratios": [asdict(r) for r in self.ratios], "targets": [asdict(t) for t in self.targets()],
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
        }  # fmt: skip

    def text(self) -> str:
        """For people; the mask-free ratios are the ones that say what packing saves."""
        lines = [
            f"{'pixel frames':>12} {'baseline':14} {'whole take':>10} {'last frame':>10}   {'counted':13} predicted"
        ]
        pair = lambda x: "—" if x is None else f"{x[0]:.2f} / {x[1]:.2f}"
        for r in sorted(self.ratios, key=lambda r: r.baseline != "mask-free"):
            lines.append(
                f"{r.pixel_frames:>12} {r.baseline:14} {r.end_to_end:>10.2f} {r.last_frame:>10.2f}   "
                f"{pair(r.counted):13} {pair(r.predicted)}"
            )
        for name, arm in self.arms.items():
            peaks = [p for p in arm.peak_bytes if p is not None]
            peak = f"{max(peaks) / 1e6:.1f} MB at the peak" if peaks else "peak not known"
            lines.append(
                f"{name}: {sum(arm.seconds):.1f} s, {arm.seconds[0]:.3f} → {arm.seconds[-1]:.3f} s a frame, "
                f"{arm.held_bytes[-1] / 1e6:.1f} MB held at the end, {peak}"
            )
        if (e := self.calibration["e"]) is not None:
            lines.append(f"an attention FLOP takes {e:.2f} times as long as one of a matrix product here")
        words = {True: "met", False: "NOT MET", None: "not judged"}
        for t in self.targets():
            lines.append(f"{words[t.met]:>10}  {t.name} {t.limit}: {t.found}" + (f" ({t.note})" if t.note else ""))
        return "\n".join(lines)

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """`stem`.json and `stem`.png in `folder`. Raises LongtakeError."""
        data, picture = folder / f"{stem}.json", folder / f"{stem}.png"
        write_atomically(data, (json.dumps(self.as_dict(), indent=1) + "\n").encode())
        write_atomically(picture, draw(self))
        return data, picture


def draw(report: PackReport) -> bytes:
    """PNG: seconds of every latent frame, and bytes held."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    canvas = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = canvas.subplots(1, 2)
    for (name, arm), colour in zip(report.arms.items(), ("#1f6f8b", "#c2571a", "#9aa5ab"), strict=False):
        frame = np.arange(1, len(arm.seconds) + 1)
        left.plot(frame, arm.seconds, color=colour, lw=1.5, label=name)
        right.plot(frame, np.asarray(arm.held_bytes) / 1e6, color=colour, lw=1.5, label=name)
        if all(p is not None for p in arm.peak_bytes):
            right.plot(frame, np.asarray(arm.peak_bytes, float) / 1e6, color=colour, lw=0.8, ls=":")
    left.set(title="one latent frame", xlabel="latent frame", ylabel="seconds")
    right.set(title="K/V in use (dotted: allocated at the peak)", xlabel="latent frame", ylabel="MB")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    machine, settings = report.provenance["machine"], report.settings
    where = machine["gpu"] or f"{machine['cpu']}, torch threads {settings['threads']}"
    canvas.suptitle(f"{report.shape['name']} on {where}, {settings['dtype']}, {settings['steps']} steps", fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(canvas).print_png(buffer)
    return buffer.getvalue()
