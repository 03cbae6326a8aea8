"""One look for every picture: colours, canvas, and PNG bytes."""

from __future__ import annotations

import io
from typing import Any

INK, ACCENT, PALE = "#1f6f8b", "#c2571a", "#9aa5ab"


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes; `grid` goes to matplotlib's grid of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, gridspec_kw=grid or None)


def png(figure: Any, title: str, size: int = 9) -> bytes:
    """The picture under its title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=size)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
