"""One self-contained HTML file: what was compared, the tables, the curves."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;width:100%;display:block;overflow-x:auto;margin:1rem 0}
th,td{border-bottom:1px solid #d6dbe1;padding:.3rem .55rem;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
tr.control td{color:#68707a}small{color:#68707a}img{max-width:100%}
"""
COLUMNS = {
    "A": (
        ("recall_colour", "colour recall"), ("recall_colour_in_range", "in range"),
        ("recall_colour_far_in_sink", "far, seen by sink"), ("recall_colour_repainted", "repainted"),
        ("recall_texture", "texture recall"), ("lawful", "lawful"), ("missing", "missing"), ("duplicated", "twice"),
        ("psnr_db", "PSNR dB"),
    ),
    "B": (
        ("recall_colour", "colour recall"), ("recall_texture", "texture recall"), ("duplicated", "twice"),
        ("chunks_to_first_error", "chunks to first error"), ("clock_lawful", "clock lawful"),
        ("background_ssim", "background SSIM"), ("luma_slope", "luma slope"), ("contrast_slope", "contrast slope"),
    ),
}  # fmt: skip
MEANING = {
    "A": "Protocol A: true frames are committed under the policy; two chunks follow, from the same noise for all.",
    "B": "Protocol B: a free run after a short true beginning, at many times the training length.",
}


def page(summary: dict[str, Any]) -> str:
    """The report as HTML."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>longtake compare</title><style>{STYLE}</style><h1>longtake compare</h1>"
        f"<p>{_escape(_origin(summary))}</p>"
    ]
    for table in summary["tables"]:
        parts.append(f"<h2>{_escape(table['model'])}, protocol {table['protocol']}</h2><p>{MEANING[table['protocol']]} "
                     "Means with 95 % bootstrap intervals, clustered by seed; an event counts as recalled only where "
                     "motion and clock are lawful. "
                     f"Chance: colour {table['chance']['colour']:.3f}, texture {table['chance']['texture']:.3f}. "
                     f"{_escape(_admission(table['admitted']))}</p>")  # fmt: skip
        parts += [_table(table), *(_image(figure) for figure in figures(table))]
    if summary.get("notes"):
        parts.append(
            "<h2>Not in the tables</h2><ul>" + "".join(f"<li>{_escape(n)}" for n in summary["notes"]) + "</ul>"
        )
    parts.append(f"<p><small>{_escape(summary.get('command', ''))}</small></p>")
    return "\n".join(parts)


def markdown(table: dict[str, Any]) -> str:
    """A table for a README: the columns that matter most."""
    columns = COLUMNS[table["protocol"]][:5]
    lines = ["| arm | " + " | ".join(title for _, title in columns) + " | attended tokens | device bytes |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for row in table["rows"]:
        cells = [_plain(row.get(key)) for key, _ in columns]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} | {row['attended_tokens']} | {row['device_bytes']} |")
    return "\n".join(lines)


def figures(table: dict[str, Any]) -> list[bytes]:
    """PNG curves: recall over the gap, recall over bytes."""
    from matplotlib.figure import Figure

    made = []
    rows = [row for row in table["rows"] if row["control"] not in ("truth", "frozen", "loop")]
    if table["protocol"] == "A":
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            points = [(int(gap), e["mean"]) for gap, e in row["recall_colour_by_gap"].items() if e["n"] >= 5]
            if points:
                style = ":" if row["control"] else "-"
                axes.plot(*zip(*sorted(points), strict=True), style, marker=".", label=row["arm"])
        axes.axhline(table["chance"]["colour"], color="0.6", lw=0.8)
        axes.set(xscale="log", xlabel="gap, latent frames", ylabel="colour recall", ylim=(0, 1.02))
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
        made.append(_png(figure))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        value = row["recall_colour"]
        if value.get("n") and row["total_bytes"]:
            lines.setdefault(row["name"], []).append((row["total_bytes"] / 2**20, value["mean"], *value["ci95"]))
    for name, points in lines.items():
        points.sort()
        x, y, low, high = (list(v) for v in zip(*points, strict=True))
        below, above = ([abs(a - b) for a, b in zip(y, end, strict=True)] for end in (low, high))
        axes.errorbar(x, y, yerr=[below, above], marker="o", ms=3, lw=1, capsize=2, label=name)
    axes.axhline(table["chance"]["colour"], color="0.6", lw=0.8)
    axes.set(xlabel="MiB held in all", ylabel="colour recall", ylim=(0, 1.02))
    if lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return [*made, _png(figure)]


def _table(table: dict[str, Any]) -> str:
    columns = COLUMNS[table["protocol"]]
    head = "".join(f"<th>{title}</th>" for _, title in columns)
    lines = [f"<table><tr><th>arm</th><th>n</th>{head}<th>vs full (Holm p)</th><th>attended tokens</th>"
             "<th>device MiB</th><th>all MiB</th></tr>"]  # fmt: skip
    for row in table["rows"]:
        cells = "".join(f"<td>{_plain(row.get(key))}</td>" for key, _ in columns)
        against = row.get("against_full")
        versus = f"{against['difference']:+.3f} ({against['p_holm']:.3g})" if against else ""
        kind = " class=control" if row["control"] else ""
        lines.append(
            f"<tr{kind}><td>{_escape(row['arm'])}</td><td>{row['events']}</td>{cells}<td>{versus}</td>"
            f"<td>{row['attended_tokens']}</td><td>{row['device_bytes'] / 2**20:.2f}</td>"
            f"<td>{row['total_bytes'] / 2**20:.2f}</td></tr>"
        )
    return "\n".join(lines) + "</table>"


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, dict) and not value.get("n")):
        return "—"
    if isinstance(value, dict):
        low, high = value["ci95"]
        return f"{value['mean']:.3g} [{low:.3g}, {high:.3g}]"
    return str(value)


def _admission(admitted: dict[str, bool]) -> str:
    good = [name for name, yes in admitted.items() if yes]
    bad = [name for name, yes in admitted.items() if not yes]
    text = f"Admitted (truth ≥ 0.95, frozen and loop at most chance): {', '.join(good) or 'none'}."
    return text + (f" Not admitted: {', '.join(bad)}." if bad else "")


def _origin(summary: dict[str, Any]) -> str:
    origin = summary.get("origin", {})
    commit = (origin.get("git") or {}).get("commit", "unknown commit")
    return f"{origin.get('date', '')} · {origin.get('machine', {}).get('cpu', '')} · {commit}"


def _image(data: bytes) -> str:
    return f"<img alt='curves of the table above' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _escape(text: str) -> str:
    return html.escape(str(text))
