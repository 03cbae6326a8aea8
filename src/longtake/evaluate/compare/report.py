"""One self-contained HTML file: what was compared, the tables, the curves."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

ENOUGH = 256  # events of an arm, for a figure to be leant on
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:1.5rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.5rem;margin:0}h2{font-size:1.2rem;margin:2rem 0 .3rem}small,.note{color:#5b636d;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{border-bottom:1px solid #d6dbe1;padding:.3rem .6rem;text-align:right;white-space:nowrap;vertical-align:top}
th{vertical-align:bottom;font-weight:600;white-space:normal;min-width:3.5rem}td small{display:block;font-size:11px}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff;max-width:34vw;
white-space:normal;min-width:7rem}tr.control td{color:#5b636d}tr.control td:first-child{font-style:italic}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:.5rem}img{width:100%}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:13px}.legend i{display:inline-block;width:1.1em;
height:.3em;margin-right:.4em;vertical-align:middle}li{overflow-wrap:anywhere}
"""
COLUMNS = {
    "A": (
        ("recall_colour", "colour recall"), ("recall_colour_in_range", "… in range"),
        ("recall_colour_far_in_sink", "… far, seen by sink"), ("recall_colour_repainted", "… repainted"),
        ("recall_texture", "texture recall"), ("lawful", "lawful"), ("missing", "missing"), ("duplicated", "twice"),
        ("distance_px", "off by, px"), ("psnr_db", "PSNR, dB"),
    ),
    "B": (
        ("recall_colour", "colour recall"), ("recall_texture", "texture recall"), ("duplicated", "twice"),
        ("chunks_to_first_error", "chunks to first error"), ("clock_lawful", "clock lawful"),
        ("background_ssim", "background SSIM"), ("luma_slope", "luma slope"), ("contrast_slope", "contrast slope"),
    ),
}  # fmt: skip
MEANING = {
    "A": "Protocol A: true frames are committed under the policy; two chunks follow, from the same noise for all.",
    "B": "Protocol B: a free run after a short true beginning, many times as long as a training clip.",
}
COSTS = (
    ("attended_tokens", "tokens attended, at most", 1), ("device_bytes", "MiB on the device", 2**20),
    ("total_bytes", "MiB in all, archive included", 2**20),
)  # fmt: skip
COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#000000",
    "#7f9f3f", "#c08000", "#5f5fdf", "#00806f", "#a0004f", "#708090", "#d4a6c8", "#86bcb6",
)  # fmt: skip


def page(summary: dict[str, Any]) -> str:
    """The report as HTML."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>longtake compare</title><style>{STYLE}</style><h1>longtake compare</h1>"
        f"<p class=note>{_escape(_origin(summary))}<br><code>{_escape(summary.get('command', ''))}</code></p>"
    ]
    for table in summary["tables"]:
        rows = table["rows"]
        few = min((row["events"] for row in rows if row["name"] not in ("frozen", "loop")), default=0)
        parts.append(
            f"<h2>{_escape(table['model'])}, protocol {table['protocol']}</h2><p>{MEANING[table['protocol']]} Means "
            "with 95 % bootstrap intervals, clustered by seed; a return counts as recalled only where motion and clock "
            f"are lawful. Chance: colour {table['chance']['colour']:.3f}, texture {table['chance']['texture']:.3f}. "
            f"{_escape(_admission(table['admitted']))}"
            + (f" <b>Only {few} events in a row: too few to lean on.</b>" if few < ENOUGH else "")
            + "</p>"
        )
        parts += [_figures(table), _table(table)]
    if summary.get("notes"):
        listed = "".join(f"<li>{_escape(note)}</li>" for note in summary["notes"])
        parts.append(f"<h2>Not in the tables</h2><ul>{listed}</ul>")
    return "\n".join(parts) + "\n</html>\n"


def markdown(table: dict[str, Any]) -> str:
    """A table for a README: the columns that matter most."""
    columns = COLUMNS[table["protocol"]][:5]
    titles = [title.replace("…", "colour") for _, title in columns]
    lines = ["| arm | " + " | ".join(titles) + " | attended tokens | device MiB | all MiB |"]
    lines.append("|---" * (len(columns) + 4) + "|")
    for row in table["rows"]:
        cells = [_plain(row.get(key)) for key, _ in columns]
        held = [f"{row[key] / 2**20:.2f}" for key in ("device_bytes", "total_bytes")]
        lines.append(f"| {row['arm']} | {' | '.join([*cells, str(row['attended_tokens']), *held])} |")
    return "\n".join(lines)


def figures(table: dict[str, Any]) -> list[bytes]:
    """PNG curves: colour recall over each cost, with intervals; and over the gap, each arm at its largest budget."""
    from matplotlib.figure import Figure

    made, colours = [], colours_of(table)
    drawn = [row for row in table["rows"] if row["name"] in colours]
    for key, title, unit in COSTS:
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, colour in colours.items():
            points = sorted(
                (row[key] / unit, row["recall_colour"]["mean"], *row["recall_colour"]["ci95"])
                for row in drawn
                if row["name"] == name and row["recall_colour"].get("n") and row[key]
            )
            if points:
                x, y, low, high = (list(values) for values in zip(*points, strict=True))
                spread = [[abs(a - b) for a, b in zip(y, end, strict=True)] for end in (low, high)]
                axes.errorbar(x, y, yerr=spread, color=colour, marker="o", ms=3, lw=1, capsize=2)
        _finish(axes, table, title)
        made.append(_png(figure))
    if table["protocol"] == "A":
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for row in {row["name"]: row for row in drawn}.values():  # the last of a name has the largest budget
            points = sorted((int(gap), e["mean"]) for gap, e in row["recall_colour_by_gap"].items() if e["n"] >= 5)
            if points:
                style = ":" if row["control"] else "-"
                axes.plot(*zip(*points, strict=True), style, color=colours[row["name"]], marker=".", lw=1)
        axes.set_xscale("log", base=2)
        _finish(axes, table, "gap in latent frames, at the largest budget")
        made.append(_png(figure))
    return made


def colours_of(table: dict[str, Any]) -> dict[str, str]:
    """A colour for every name that is drawn: policies, and the controls that a model makes."""
    names = dict.fromkeys(row["name"] for row in table["rows"] if row["control"] not in ("truth", "frozen", "loop"))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _figures(table: dict[str, Any]) -> str:
    images = "".join(
        f"<img alt='curves of the table below' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        for data in figures(table)
    )
    legend = "".join(
        f"<span><i style='background:{colour}'></i>{_escape(name)}</span>" for name, colour in colours_of(table).items()
    )
    return f"<div class=figures>{images}</div><div class=legend>{legend}</div>"


def _table(table: dict[str, Any]) -> str:
    columns = COLUMNS[table["protocol"]]
    head = "".join(f"<th>{title}</th>" for _, title in columns)
    lines = [f"<div class=wide><table><tr><th>arm</th><th>events</th>{head}<th>colour, against full</th>"
             "<th>tokens attended</th><th>device MiB</th><th>all MiB</th><th>s a cell</th></tr>"]  # fmt: skip
    for row in table["rows"]:
        cells = "".join(f"<td>{_cell(row.get(key))}</td>" for key, _ in columns)
        against = row.get("against_full")
        versus = f"{against['difference']:+.3f}<small>p {against['p_holm']:.2g}</small>" if against else "—"
        kind = " class=control" if row["control"] else ""
        held = "".join(f"<td>{row[key] / 2**20:.2f}</td>" for key in ("device_bytes", "total_bytes"))
        lines.append(
            f"<tr{kind}><td>{_escape(row['arm'])}</td><td>{row['events']}</td>{cells}<td>{versus}</td>"
            f"<td>{row['attended_tokens']}</td>{held}<td>{row['seconds_per_cell']}</td></tr>"
        )
    return "\n".join(lines) + "</table></div>"


def _cell(value: Any) -> str:
    mean, _, rest = _plain(value).partition(" ")
    return f"{mean}<small>{rest}</small>" if rest else mean


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, dict) and not value.get("n")):
        return "—"
    if isinstance(value, dict):
        low, high = value["ci95"]
        return f"{value['mean']:.3g} [{low:.3g}, {high:.3g}]"
    return str(value)


def _admission(admitted: dict[str, bool]) -> str:
    titles = {name: name.replace("_", " ") for name in admitted}
    good = [titles[name] for name, yes in admitted.items() if yes]
    bad = [titles[name] for name, yes in admitted.items() if not yes]
    text = f"Admitted measures (truth at 0.95 or more, frozen and loop at most by chance): {', '.join(good) or 'none'}."
    return text + (f" Not admitted: {', '.join(bad)}." if bad else "")


def _origin(summary: dict[str, Any]) -> str:
    origin = summary.get("origin", {})
    commit = (origin.get("git") or {}).get("commit", "unknown commit")[:12]
    machine = origin.get("machine", {})
    return " · ".join(filter(None, (origin.get("date"), machine.get("gpu") or machine.get("cpu"), commit)))


def _finish(axes: Any, table: dict[str, Any], title: str) -> None:
    axes.axhline(table["chance"]["colour"], color="0.6", lw=0.8, ls="--")
    axes.set(xlabel=title, ylabel="colour recall", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=140)
    return data.getvalue()


def _escape(text: str) -> str:
    return html.escape(str(text))
