"""A table of arms by measures: numbers with intervals, sortable, within reach on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .text import escape, estimate, is_estimate, number, span_of


@dataclass(frozen=True)
class Column:
    """`key` of a row; `better` is "higher", "lower", "near 0" or ""; a shown number is multiplied by `scale`."""

    key: str
    title: str
    better: str = ""
    scale: float = 1.0
    hint: str = ""
    unit: str = ""

    @property
    def named(self) -> str:
        """Title and unit, as an axis has them."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


def table(
    name: str, caption: str, rows: Sequence[dict[str, Any]], columns: Sequence[Column],
    note: Callable[[dict[str, Any], Column], str | None] = lambda row, column: None,
) -> str:  # fmt: skip
    """`note` may say what stands in place of a number that is not there. The best mean of a column is marked."""
    head = "".join(f"<th scope=col>{_title(column)}</th>" for column in columns)
    spans = {column.key: span_of([row.get(column.key) for row in rows]) for column in columns}
    best = {column.key: _best(rows, column) for column in columns}
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column.key)
            mean = value.get("mean") if isinstance(value, dict) else value
            data = f" data-value='{mean}'" if isinstance(mean, int | float) else ""
            best_one = " class=best" if data and mean == best[column.key] else ""
            cells.append(f"<td{data}{best_one}>{note(row, column) or _cell(value, spans[column.key], column)}</td>")
        kind = " class=control" if row.get("control") else ""
        lines.append(f"<tr{kind}><th scope=row>{escape(row['arm'])}</th>{''.join(cells)}</tr>")
    return (
        f"<div class=wide role=region tabindex=0 aria-labelledby='{name}-caption'><table id='{name}'>"
        f"<caption id='{name}-caption'>{caption}</caption><thead><tr><th scope=col>arm</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def wish(better: str) -> str:
    """What one wants of a measure, in words."""
    return {"higher": "higher is better", "lower": "lower is better", "near 0": "best near 0"}.get(better, "")


def _title(column: Column) -> str:
    hint = f" title='{escape(column.hint)}'" if column.hint else ""
    below = "".join(f"<small>{escape(text)}</small>" for text in (column.unit, wish(column.better)) if text)
    return f"<span{hint}>{escape(column.title)}</span>{below}"


def _cell(value: Any, span: tuple[float, float] | None, column: Column) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value * column.scale)
    return estimate(value, span, column.scale)


def _best(rows: Sequence[dict[str, Any]], column: Column) -> float | None:
    """The best mean, if there are two to choose from; controls are out of the race."""
    values: list[Any] = [row.get(column.key) for row in rows if not row.get("control")]
    told = [value["mean"] if is_estimate(value) else value for value in values]
    means: list[float] = [mean for mean in told if isinstance(mean, int | float)]
    if not column.better or len(set(means)) < 2:
        return None
    return {"higher": max(means), "lower": min(means), "near 0": min(means, key=abs)}[column.better]


def axis(column: Column) -> dict[str, object]:
    """A column as the axis of a chart."""
    return {"key": column.key, "title": column.named, "better": column.better, "scale": column.scale}
