"""Pictures of selection: which blocks each chunk sees, and demand by age."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .canvas import INK, PALE, canvas, png

if TYPE_CHECKING:
    from .selection import SelectionReport


def figures(report: SelectionReport) -> dict[str, bytes]:
    """PNG bytes by name: `map` and `age`."""
    return {"map": map_figure(report), "age": age_figure(report)}


def map_figure(report: SelectionReport) -> bytes:
    """Chunks from left to right, blocks from old to new: in how many of the layers a block was picked."""
    figure, axes = canvas(7, 4.6)
    first, last = report.chunks[0].chunk, report.chunks[-1].chunk
    blocks = max(c.candidates[-1] for c in report.chunks) + 1
    shares = np.full((blocks, last - first + 1), np.nan)
    for c in report.chunks:
        for block in c.candidates:
            shares[block, c.chunk - first] = sum(block in layer for layer in c.picked) / len(c.picked)
    image = axes.imshow(
        shares, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
        extent=(first - 0.5, last + 0.5, -0.5, blocks - 0.5),
    )  # fmt: skip
    axes.set_facecolor("#eeeeee")
    axes.set(xlabel="chunk", ylabel="block of the middle (chunk it was)", title="layers that picked it")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return png(figure, f"{report.model}, {report.settings['policy'].replace(',', ', ')}", 7)


def age_figure(report: SelectionReport) -> bytes:
    """How often a block was picked, by its age, beside picking at random."""
    figure, axes = canvas(7, 3.6)
    ages, picked, random = zip(*report.demand(), strict=True)
    axes.bar(ages, picked, color=INK, width=0.9, label="picked")
    axes.step(ages, random, where="mid", color=PALE, lw=1.4, label="at random")
    axes.set(xlabel="age in chunks", ylabel="share of chances", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return png(figure, f"{report.model}, {report.settings['policy'].replace(',', ', ')}", 7)
