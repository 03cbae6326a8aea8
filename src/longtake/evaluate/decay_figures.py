"""Pictures of measured attention: decay with its fit and the budget over it, its course over the steps, heat maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import ACCENT, INK, PALE, canvas, png

if TYPE_CHECKING:
    from .decay import DecayReport

COLOURS = {"text": "#7a5c99", "anchor": "#4f8a4f", "history": INK, "current": PALE}


def figures(report: DecayReport) -> dict[str, bytes]:
    """PNG bytes by name: `fit`, `steps` and `heatmap`."""
    return {"fit": fit_figure(report), "steps": steps_figure(report), "heatmap": heat_figure(report)}


def fit_figure(report: DecayReport) -> bytes:
    """Mass by age with the fitted line and PackCache's shares of the same total; ρ of every layer beside it."""
    figure, (left, right) = canvas(9, 3.6, 1, 2, width_ratios=[2.2, 1])
    draw_fit(report, left, right)
    return png(figure, _title(report))


def draw_fit(report: DecayReport, left: Any, right: Any) -> None:
    """The two parts of `fit_figure`, on axes."""
    from matplotlib.ticker import MaxNLocator

    ages, mass, _ = report.by_age()
    layers = mass.mean(1)  # [L, D]
    mean, found = layers.mean(0), report.decay()
    for row in layers:
        left.plot(ages, np.maximum(row, 1e-7), color=PALE, lw=0.6, alpha=0.7)
    left.plot(ages, mean, "o-", color=INK, ms=4, lw=1.4, label="measured, mean of layers")
    if found is not None:
        line = [found.mass(float(age)) for age in ages]
        left.plot(ages, line, "--", color=ACCENT, lw=1.4, label=f"ρ = {found.rho:.3f}, R² = {found.r2:.3f}")
    for style, (name, shares) in zip((":", "-."), report.budget().items(), strict=False):
        x = np.arange(1, len(shares) + 1)
        scaled = np.asarray(shares) * mean.sum()
        left.step(x, scaled, style, where="mid", color="black", lw=1, label=f"budget, {name}")
    left.set(yscale="log", xlabel="age, latent frames", ylabel="attention mass of a frame", title="measured decay")
    left.legend(frameon=False, fontsize=8)
    fits = [report.decay(layer) for layer in range(len(layers))]
    rhos = [np.nan if f is None else f.rho for f in fits]
    right.plot(rhos, range(len(rhos)), "o", color=INK, ms=4)
    if found is not None:
        right.axvline(found.rho, color=ACCENT, ls="--", lw=1)
    right.set(xlabel="ρ", ylabel="layer", title="by layer")
    right.invert_yaxis()
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))


def steps_figure(report: DecayReport) -> bytes:
    """Where attention goes at each denoising step, chunks with a history only."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(6, 3.4, 1, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for kind, values in report.by_step().items():
        axes.plot(np.arange(1, len(values) + 1), values, "o-", color=COLOURS[kind], ms=4, lw=1.4, label=kind)
    axes.set(xlabel="step", ylabel="attention mass", title="over the denoising steps")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return png(figure, _title(report))


def heat_figure(report: DecayReport) -> bytes:
    """Exact rows of the last chunk's last step: queries down, keys across, frame borders drawn."""
    from matplotlib.colors import LogNorm

    maps = report.heat
    figure, axes = canvas(4.2 * max(1, len(maps)), 3.6, 1, max(1, len(maps)))
    for ax, heat in zip(np.atleast_1d(axes), maps, strict=False):
        rows = np.maximum(heat.rows, 1e-9)
        shown = ax.imshow(rows, aspect="auto", cmap="magma", norm=LogNorm(max(rows.min(), 1e-7), rows.max()))
        for border in heat.borders[1:]:
            ax.axvline(border - 0.5, color="white", lw=0.5, alpha=0.9)
        ax.set(title=f"layer {heat.layer}, step {heat.step + 1}", xlabel="keys, binned", ylabel="queries")
        figure.colorbar(shown, ax=ax, label="mass per key")
    if not maps:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    return png(figure, _title(report))


def _title(report: DecayReport) -> str:
    return f"{report.model}, {report.policy} history, {len(report.takes)} takes"
