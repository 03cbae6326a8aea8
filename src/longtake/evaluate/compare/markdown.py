"""A comparison's tables for README and docs, made from a committed summary, so that no number is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import LongtakeError
from ..provenance import read_json
from .summary import COUNTED

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
L = (
    ("nats", "nats a code, actors who return"), ("nats_in_range", "… seen within a clip"),
    ("nats_seen", "actors in view"), ("nats_scenery", "scenery"),
)  # fmt: skip
COLUMNS = {"A": A, "B": B, "L": L}
BY_GAP = {"recall_colour_by_gap": "colour recalled at gap", "nats_by_gap": "nats a code at gap"}

PAIRED = ("against_window", "against_chosen")
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
    """All tables of a summary, what is not in them, and where they come from."""
    return "\n\n".join([*(_table(table, brief) for table in summary["tables"]), *_left_out(summary), _origin(summary)])


def _table(table: dict[str, Any], brief: bool) -> str:
    columns = COLUMNS[table["protocol"]]
    rows = [row for row in table["rows"] if not brief or _chosen(row, table["rows"])]
    others = {
        key: next(row[key]["other"].partition(" @")[0] for row in rows if key in row)
        for key in PAIRED if any(key in row for row in rows)
    }  # fmt: skip
    titles = [title for _, title in columns] + [
        f"{COUNTED[table['protocol']][1]}, less that of `{other}`" for other in others.values()
    ]
    lines = [
        f"`{Path(table['model']).name}`, protocol {table['protocol']}:", "",
        "| policy | budget, KiB | returns | " + " | ".join(titles)
        + " | tokens attended | MiB on the device | MiB in all |",
        "|---|---|---|" + "---|" * (len(titles) + 3),
    ]  # fmt: skip
    for row in rows:
        name = f"*{row['name']}*" if row["control"] else f"`{row['name']}`"
        cells = [_estimate(row.get(key), row["events"]) for key, _ in columns]
        cells += [_difference(row.get(key)) for key in others]
        cells += [str(row["attended_tokens"]), *(f"{row[key] / 2**20:.1f}" for key in ("device_bytes", "total_bytes"))]
        lines.append(f"| {name} | {_kib(row)} | {row['events']} | {' | '.join(cells)} |")
    for key, title in () if brief else BY_GAP.items():
        lines += _by_gap(table["rows"], key, title)
    return "\n".join(lines)


def _by_gap(rows: list[dict[str, Any]], key: str, title: str) -> list[str]:
    """One figure over the gap, of every policy at every budget."""
    rows = [row for row in rows if key in row and not row["control"]]
    gaps = sorted({gap for row in rows for gap in row[key]}, key=int)
    if not gaps:
        return []
    lines = ["", f"| {title} | budget, KiB | " + " | ".join(gaps) + " |", "|---|---|" + "---|" * len(gaps)]
    for row in rows:
        cells = [_estimate(row[key].get(gap), row["events"]) for gap in gaps]
        lines.append(f"| `{row['name']}` | {_kib(row)} | {' | '.join(cells)} |")
    return lines


def _kib(row: dict[str, Any]) -> str:
    return "" if row["budget"] is None else f"{row['budget'] // 1024}"


def _chosen(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    largest: Callable[[str], int] = lambda name: max(r["budget"] or 0 for r in rows if r["name"] == name)
    return (row["budget"] or 0) == largest(row["name"])


def _estimate(found: dict[str, Any] | None, events: int) -> str:
    """Mean and interval; with how many events, where it is not of all of them."""
    if not found or found.get("mean") is None:
        return ""
    ends = f" [{found['ci95'][0]:.2f}, {found['ci95'][1]:.2f}]" if found["ci95"] else ""
    return f"{found['mean']:.2f}{ends}" + (f" of {found['n']}" if found["n"] != events else "")


def _difference(found: dict[str, Any] | None) -> str:
    """Difference and interval; bold if it is unlikely to be chance."""
    if not found:
        return ""
    ends = f" [{found['ci95'][0]:+.2f}, {found['ci95'][1]:+.2f}]" if found["ci95"] else ""
    gap = f"{found['difference']:+.2f}"
    return (f"**{gap}**" if found["p_holm"] < SURE else gap) + ends


def _left_out(summary: dict[str, Any]) -> list[str]:
    """What was asked for and has no row."""
    notes = list(dict.fromkeys(summary.get("notes") or ()))
    return [f"Not in the table: {'; '.join(notes)}."] if notes else []


def _origin(summary: dict[str, Any]) -> str:
    """The command, the machine, and every commit that cells were made at."""
    made = summary.get("made_by") or []
    machines = dict.fromkeys(one["gpu"] or one["cpu"] or "" for one in made)
    torches = dict.fromkeys(f"torch {one['torch']}" for one in made if one["torch"])
    dates = sorted({one[end][:10] for one in made for end in ("from", "to") if one[end]})
    commits = [f"{one['cells']} cells at {commit_of(one, 10)}" for one in made]
    parts = [*machines, " to ".join(dict.fromkeys(dates[:1] + dates[-1:])), *torches, ", ".join(commits)]
    return ": ".join([f"`{summary['command']}`", ", ".join(part for part in parts if part) + "."])


def commit_of(made: dict[str, Any], digits: int) -> str:
    """The commit of one entry of `made_by`, and whether the code was as committed."""
    return (made["commit"] or "no commit")[:digits] + (" with uncommitted changes" if made["dirty"] else "")
