"""A comparison's tables for README and docs, made from a committed summary, so that no number is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import LongtakeError
from ..provenance import read_json

MARKS = re.compile(
    r"<!-- compare:(?P<name>[\w.-]+)(?P<brief> brief)? -->\n(?P<table>.*?)<!-- /compare:(?P=name) -->", re.DOTALL
)
A = (
    ("recall_colour", "colour recalled"), ("recall_colour_in_range", "… seen within a clip"),
    ("recall_colour_far_in_sink", "… long ago, in the sink"), ("recall_colour_repainted", "… repainted"),
    ("recall_texture", "texture recalled"), ("lawful", "lawful"),
)  # fmt: skip
B = (
    ("recall_colour", "colour recalled"), ("recall_texture", "texture recalled"),
    ("chunks_to_first_error", "chunks to first error"), ("clock_lawful", "clock lawful"),
    ("luma_slope", "luma, grey levels / 1,000"), ("contrast_slope", "contrast, the same"),
)  # fmt: skip

SURE = 0.05  # a corrected p below it is set in bold


def fill(document: str, folder: Path) -> tuple[str, int]:
    """The document with every block `<!-- compare:NAME --> … <!-- /compare:NAME -->` made anew from `folder`/NAME.json,
    and how many blocks there were. `<!-- compare:NAME brief -->` leaves out all but each policy's largest budget.
    Raises LongtakeError if a summary is missing."""

    def made(block: re.Match[str]) -> str:
        path = folder / f"{block['name']}.json"
        if not path.is_file():
            raise LongtakeError(f"no {path}: copy the summary.json of `longtake compare` there, or drop the block")
        begin = block[0].partition("\n")[0]
        return f"{begin}\n{markdown(read_json(path), bool(block['brief']))}\n<!-- /compare:{block['name']} -->"

    return MARKS.subn(made, document)


def markdown(summary: dict[str, Any], brief: bool = False) -> str:
    """All tables of a summary, each with where it comes from."""
    return "\n\n".join([_table(table, brief) for table in summary["tables"]] + [_origin(summary)])


def _table(table: dict[str, Any], brief: bool) -> str:
    columns = A if table["protocol"] == "A" else B
    rows = [row for row in table["rows"] if not brief or _chosen(row, table["rows"])]
    against = next((row["against_window"]["other"].partition(" @")[0] for row in rows if "against_window" in row), None)
    titles = [title for _, title in columns] + ([f"colour, less that of `{against}`"] if against else [])
    lines = [
        f"`{Path(table['model']).name}`, protocol {table['protocol']}:", "",
        "| policy | budget, KiB | returns | " + " | ".join(titles)
        + " | tokens attended | MiB on the device | MiB in all |",
        "|---|---|---|" + "---|" * (len(titles) + 3),
    ]  # fmt: skip
    for row in rows:
        name = f"*{row['name']}*" if row["control"] else f"`{row['name']}`"
        budget = "" if row["budget"] is None else f"{row['budget'] // 1024}"
        cells = [_estimate(row.get(key), row["events"]) for key, _ in columns]
        cells += [_difference(row.get("against_window"))] * bool(against)
        cells += [str(row["attended_tokens"]), *(f"{row[key] / 2**20:.1f}" for key in ("device_bytes", "total_bytes"))]
        lines.append(f"| {name} | {budget} | {row['events']} | {' | '.join(cells)} |")
    return "\n".join(lines if brief else [*lines, *_by_gap(table["rows"])])


def _by_gap(rows: list[dict[str, Any]]) -> list[str]:
    """Colour recalled over the gap, of every policy at its largest budget."""
    found = {row["name"]: row["recall_colour_by_gap"] for row in rows if "recall_colour_by_gap" in row}
    gaps = sorted({gap for row in found.values() for gap in row}, key=int)
    if not gaps:
        return []
    lines = ["", "| colour recalled at gap | " + " | ".join(gaps) + " |", "|---|" + "---|" * len(gaps)]
    for row in rows:
        if row["control"] or not _chosen(row, rows):
            continue
        cells = [_estimate(row["recall_colour_by_gap"].get(gap), row["events"]) for gap in gaps]
        lines.append(f"| `{row['name']}` | {' | '.join(cells)} |")
    return lines


def _chosen(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    largest: Callable[[str], int] = lambda name: max(r["budget"] or 0 for r in rows if r["name"] == name)
    return (row["budget"] or 0) == largest(row["name"])


def _estimate(found: dict[str, Any] | None, events: int) -> str:
    """Mean and interval; with how many events, where it is not of all of them."""
    if not found or found.get("mean") is None:
        return ""
    low, high = found["ci95"]
    return f"{found['mean']:.2f} [{low:.2f}, {high:.2f}]" + (f" of {found['n']}" if found["n"] != events else "")


def _difference(found: dict[str, Any] | None) -> str:
    """Difference and interval; bold if it is unlikely to be chance."""
    if not found:
        return ""
    low, high = found["ci95"]
    gap = f"{found['difference']:+.2f}"
    return f"{f'**{gap}**' if found['p_holm'] < SURE else gap} [{low:+.2f}, {high:+.2f}]"


def _origin(summary: dict[str, Any]) -> str:
    origin = summary["origin"]
    machine, versions = origin.get("machine", {}), origin.get("versions", {})
    parts = [f"`{summary['command']}`", machine.get("processor") or machine.get("cpu") or "", origin.get("date", "")]
    if torch := versions.get("torch"):
        parts.append(f"torch {torch}")
    commit = (origin.get("git") or {}).get("commit") or ""
    parts.append(f"commit {commit[:10]}" if commit else "")
    return ": ".join([parts[0], ", ".join(part for part in parts[1:] if part) + "."])
