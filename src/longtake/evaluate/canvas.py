"""One look for every picture: colours, canvas, and PNG bytes."""

from __future__ import annotations

import io
import textwrap
from typing import Any

INK, ACCENT, PALE = "#1f6f8b", "#c2571a", "#9aa5ab"


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes; `grid` goes to matplotlib's grid of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, gridspec_kw=grid or None)


def from_zero(*axes: Any) -> None:
    """Axes of a cost by a number of things: from 0 on, whole numbers below, a legend where there is something."""
    from matplotlib.ticker import MaxNLocator

    for ax in axes:
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25, lw=0.6)
        if ax.lines:
            ax.legend(frameon=False, fontsize=8)
        else:
            ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)


def png(figure: Any, title: str, size: int = 9) -> bytes:
    """The picture under its title, in as many lines as it takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    across = int(figure.get_figwidth() * 72 / (0.68 * size))  # letters, which are two thirds as wide as high
    figure.suptitle(textwrap.fill(title, across), fontsize=size)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
