"""Pictures of reuse: moves per step beside the closed form, decisions with their accumulators, and the criterion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..reuse.theory import steepest_power
from .canvas import ACCENT, INK, PALE, canvas, png
from .reuse_traces import DEVIATIONS, bounds

if TYPE_CHECKING:
    from .reuse_traces import ReuseReport


def figures(report: ReuseReport) -> dict[str, bytes]:
    """PNG bytes by name: `moves`, `decisions` and `criterion`."""
    return {
        "moves": moves_figure(report), "decisions": decisions_figure(report), "criterion": criterion_figure(report)
    }  # fmt: skip


def moves_figure(report: ReuseReport) -> bytes:
    """Relative L1 of every chunk, and what it would be for Gaussian data."""
    figure, axes = canvas(7, 3.8)
    changes = report.changes()
    x = np.arange(1, changes.shape[1] + 1)
    for i, row in enumerate(changes):
        axes.plot(x, row, "o-", color=INK, ms=3, lw=1, alpha=0.7, label="measured, by chunk" if i == 0 else None)
    if not report.renoised and report.metric == "latent":
        for s, style in zip(DEVIATIONS, (":", "--", "-."), strict=True):
            axes.plot(x, report.theory(s), style, color=PALE, lw=1.2, label=f"Gaussian data, s = {s:g}")
        if (fit := report.fit()) is not None:
            axes.plot(x, report.theory(fit[0]), color=ACCENT, lw=1.4, label=f"fit, s = {fit[0]:.2g}")
    axes.set(
        xlabel="step", ylabel="relative L1 since the step before", yscale="log", ylim=bounds(changes.ravel().tolist())
    )
    axes.legend(frameon=False, fontsize=8)
    return png(figure, f"{report.model}, {report.reuse}", 8)


def decisions_figure(report: ReuseReport) -> bytes:
    """Which steps were reused, and the accumulators that decided it."""
    figure, (top, bottom) = canvas(7, 4.6, 2)
    rows = np.array([[d.reused for d in chunk] for chunk in report.decided], dtype=float)
    top.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    top.set(ylabel="chunk", title=f"reused steps (dark), {report.reused:.0%} of all")
    top.set_yticks(range(len(rows)))
    for chunk in report.decided:
        bottom.step(range(len(chunk)), [d.accumulator for d in chunk], where="mid", color=INK, lw=1, alpha=0.7)
    bottom.set(xlabel="step", ylabel="accumulator")
    return png(figure, f"{report.model}, {report.reuse}", 8)


def criterion_figure(report: ReuseReport) -> bytes:
    """Up to which power p of σ = u^p relative L1 rises over the whole way, by the data's standard deviation."""
    figure, axes = canvas(5, 3.4)
    s = np.linspace(0, 3, 200)
    axes.plot(s, [steepest_power(float(x)) for x in s], color=INK, lw=1.6)
    axes.axhline(1, color=PALE, lw=0.8, ls=":")
    axes.set(xlabel="standard deviation s of the data", ylabel="largest p that rises", ylim=(0, 1.1))
    axes.set_title("σ = u^p: relative L1 rises for p ≤ 2 / (1 + √(1 + s²))", fontsize=9)
    return png(figure, f"{report.model}, {report.reuse}", 8)
