"""Text that goes into a page: escaped, and numbers as people write them."""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from typing import Any

MARK = 64  # width of the picture of an interval


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def number(value: float | None) -> str:
    """Three significant digits, thousands in full."""
    if value is None:
        return "—"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    text = f"{value:.3g}".replace("-", "−")
    return "0" if text in ("−0", "0") else text


def mib(count: float) -> str:
    return number(count / 2**20)


def is_estimate(value: Any) -> bool:
    """A mean that was measured at least once: {"n", "mean", "ci95"}."""
    return isinstance(value, dict) and bool(value.get("n")) and value.get("mean") is not None


def span_of(values: list[Any]) -> tuple[float, float] | None:
    """From the lowest to the highest end of the intervals in a column; None where that is a point or nothing."""
    ends = [end for value in values if is_estimate(value) for end in (value["mean"], *(value.get("ci95") or ()))]
    ends = [end for end in ends if end is not None and math.isfinite(end)]
    return (min(ends), max(ends)) if ends and max(ends) > min(ends) else None


def estimate(value: Any, span: tuple[float, float] | None, scale: float = 1.0) -> str:
    """An estimate as a number, its interval, and a picture of both within `span`. One draw has no interval."""
    if not is_estimate(value):
        return "—"
    text = f"<b>{number(value['mean'] * scale)}</b>"
    if value["n"] < 2 or not value.get("ci95"):
        return f"{text}<small>one, no interval</small>"
    low, high = value["ci95"]
    text += f"<small>{number(low * scale)} to {number(high * scale)}</small>"
    if span is None:
        return text
    place = lambda x: 3 + (MARK - 6) * (x - span[0]) / (span[1] - span[0])
    return (
        f"{text}<svg class=mark viewBox='0 0 {MARK} 8' aria-hidden=true><path d='M0 4H{MARK}' class=rail />"
        f"<path d='M{place(low):.1f} 4H{max(place(high), place(low) + 0.5):.1f}' class=span />"
        f"<circle cx='{place(value['mean']):.1f}' cy=4 r=3 /></svg>"
    )


def view(table: str, kind: str, variant: str = "") -> str:
    """Where the page's script draws a view of the data of a table."""
    return f"<div data-view={kind} data-from={table}-data" + (f" data-kind={variant}" if variant else "") + "></div>"


def packed(name: str, content: Any) -> str:
    """JSON that the page's script finds under `name`, in gzip."""
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return kept(name, gzip.compress(data, 6, mtime=0))


def kept(name: str, data: bytes) -> str:
    """Bytes that the page's script finds under `name`."""
    return f"<script type=text/plain id='{escape(name)}'>{base64.b64encode(data).decode()}</script>"
