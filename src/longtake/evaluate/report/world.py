"""The tables of the procedural world: recall under each policy at each budget (protocols A and B), with controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...zoo import lanes
from ..compare.summary import COUNTED
from .files import Take
from .table import Column, axis, table
from .text import escape, is_estimate, number, packed, view
from .videos import Videos

ENOUGH = 256  # events of an arm, for a figure to be leant on
RARE = 5  # events at a gap, for a point to be drawn
COLUMNS = {
    "A": (
        Column("recall_colour", "colour recall", "higher"),
        Column("recall_colour_in_range", "colour, in range", "higher"),
        Column("recall_colour_far_in_sink", "colour, far, seen by sink", "higher"),
        Column("recall_colour_repainted", "colour, repainted", "higher"),
        Column("recall_texture", "texture recall", "higher"), Column("lawful", "lawful", "higher"),
        Column("missing", "missing", "lower"), Column("duplicated", "twice", "lower"),
        Column("distance_px", "off by, px"), Column("psnr_db", "PSNR, dB", "higher"),
    ),
    "B": (
        Column("recall_colour", "colour recall", "higher"), Column("recall_texture", "texture recall", "higher"),
        Column("duplicated", "twice", "lower"), Column("chunks_to_first_error", "chunks to first error", "higher"),
        Column("clock_lawful", "clock lawful", "higher"), Column("background_ssim", "background SSIM", "higher"),
        Column("luma_slope", "luma slope", "near 0", 1, "grey levels per 1,000 latent frames"),
        Column("contrast_slope", "contrast slope", "near 0", 1, "grey levels per 1,000 latent frames"),
    ),
    "L": (
        Column("nats", "returned", "lower", 1, "nats a code of actors who have just come back"),
        Column("nats_in_range", "returned, in range", "lower"), Column("nats_seen", "in view", "lower"),
        Column("nats_scenery", "scenery", "lower"),
    ),
}  # fmt: skip
COSTS = (
    Column("chunk_seconds", "seconds a chunk", "lower", 1, "by the clock of whoever made the cells, decoder left out"),
    Column("attended_tokens", "tokens attended, at most", "lower"),
    Column("device_bytes", "MiB on the device", "lower", 2**-20),
    Column("total_bytes", "MiB in all", "lower", 2**-20, "archives in host memory included"),
)
MEANING = {
    "A": "Protocol A: true frames are committed under the policy; two chunks follow, from the same noise for all.",
    "B": "Protocol B: a free run after a short true beginning, many times as long as a training clip.",
    "L": "Protocol L: before each true frame is committed, the model says how likely its codes are, knowing none of "
    "them. Nats a code, less is better.",
}
WATCHED = {
    "A": "What was generated, one probe's chunks after another, of the first scenes. The truth is the first video.",
    "B": "The free run of the first scenes. The truth is the first video.",
}
PICTURES = ("truth", "frozen", "loop")  # controls that no model makes, and no cost belongs to


def section(number_: int, found: dict[str, Any], folder: Path | None, videos: Videos) -> tuple[str, list[str]]:
    """Markup of a table, and the parts of the page that hold the data of its charts and of the videos in `folder`."""
    name, rows, protocol = f"world-{number_}", found["rows"], found["protocol"]
    shown = _videos(rows, folder, videos)
    few = min((row["events"] for row in rows if row["name"] not in ("frozen", "loop")), default=0)
    warning = (
        f"<p class=warn>Only {few} events in a row: too few to lean on (of {ENOUGH} and more, the order of arms "
        "begins to hold).</p>"
        if few < ENOUGH
        else ""
    )  # fmt: skip
    if min((row["seeds"] for row in rows), default=0) < 2:
        warning += "<p class=warn>One scene: its interval says nothing about others.</p>"
    chance = found["chance"]
    chosen = next((row["against_chosen"]["other"] for row in rows if "against_chosen" in row), "").partition(" @")[0]
    _, what = COUNTED[protocol]
    columns = [
        Column("events", "events"), *COLUMNS[protocol], Column("against_full", f"{what}, against full"),
        Column("against_window", f"{what}, against a window", hint="of equal bytes"),
        *([Column("against_chosen", f"{what}, against the chosen", hint=chosen)] if chosen else []), *COSTS,
        Column("seconds_per_cell", "s a cell"),
    ]  # fmt: skip
    markup = (
        f"<section id={name} aria-labelledby={name}-title><h2 id={name}-title>{escape(found['model'])}, protocol "
        f"{protocol}</h2><p>{MEANING[protocol]} Means with 95 % bootstrap intervals, clustered by seed. "
        f"{_counting(chance, found['admitted'])}</p>{warning}"
        f"<h3>{'Likelihood' if protocol == 'L' else 'Recall'} and its price</h3>"
        + f"{view(name, 'tradeoff')}{view(name, 'key')}"
        + (f"<h3>Recall over the gap</h3>{view(name, 'gaps')}" if protocol == "A" else "")
        + (f"<h3>Side by side</h3><p>{WATCHED[protocol]}</p>{view(f'{name}-films', 'player')}" if shown else "")
        + "<h3>All numbers</h3>"
        + table(f"{name}-table", "Every arm, controls first.", rows, columns, _versus)
        + "</section>"
    )
    films = [packed(f"{name}-films-data", shown)] if shown else []
    return markup, [packed(f"{name}-data", _charts(found)), *films]


def _videos(rows: list[dict[str, Any]], folder: Path | None, videos: Videos) -> dict[str, Any]:
    """What the player has to know of the videos of the first scenes; nothing if there are none."""
    groups: dict[str, list[Take]] = {}
    for row in rows if folder is not None else ():
        for seed, key in (row.get("cells") or {}).items():
            path = Path(folder or "") / "cells" / key / "take.mp4"
            if path.is_file():
                groups.setdefault(seed, []).append(Take(key, f"scene {seed}", int(seed), path))
    told = videos.add(groups.values())
    if not told:
        return {}
    takes = {
        take.key: {"prompt": take.prompt, "seed": take.seed, "curves": {}, "video": told[take.key], "wrong": []}
        for group in groups.values()
        for take in group
    }
    films = [
        {"arm": row["arm"], "name": row["name"], "variant": "", "budget": row["budget"], "control": row["control"],
         "takes": list((row.get("cells") or {}).values())}
        for row in rows
    ]  # fmt: skip
    fps = next(row["fps"] for row in rows if row.get("fps"))
    return {"fps": fps, "height": lanes.SIZE, "rows": films, "takes": takes}


def _charts(found: dict[str, Any]) -> dict[str, Any]:
    drawn = [row for row in found["rows"] if row["control"] not in PICTURES]
    qualities = [column for column in COLUMNS[found["protocol"]] if column.better]
    return {
        "rows": [
            {
                "arm": row["arm"], "name": row["name"], "variant": "", "control": row["control"],
                "budget": row["budget"],
                "values": {column.key: row.get(column.key) for column in (*qualities, *COSTS)},
                "gaps": [
                    [int(gap), each["mean"], *(each["ci95"] or [each["mean"]] * 2), each["n"]]
                    for gap, each in row.get("recall_colour_by_gap", {}).items()
                    if is_estimate(each) and each["n"] >= RARE
                ],
            }
            for row in drawn
        ],
        "costs": [axis(column) for column in COSTS],
        "qualities": [axis(column) for column in qualities],
        "chance": {f"recall_{key}": value for key, value in found["chance"].items()},
        "connect": True,
    }  # fmt: skip


def _versus(row: dict[str, Any], column: Column) -> str | None:
    if not column.key.startswith("against_"):
        return None
    against = row.get(column.key)
    if not against:
        return "—"
    low, high = against["ci95"] or (None, None)
    ends = "" if low is None else f"<small>{number(low)} to {number(high)}</small>"
    return f"{number(against['difference'])}{ends}<small>p {against['p_holm']:.2g}</small>"


def _counting(chance: dict[str, float], admitted: dict[str, bool]) -> str:
    """How returns are counted, where they are."""
    if not chance:
        return ""
    return (
        "A return counts as recalled only where motion and clock are lawful. Chance: colour "
        f"{chance['colour']:.3f}, texture {chance['texture']:.3f}. {escape(_admission(admitted))}"
    )


def _admission(admitted: dict[str, bool]) -> str:
    titles = {name: name.replace("_", " ") for name in admitted}
    good = [titles[name] for name, yes in admitted.items() if yes]
    bad = [titles[name] for name, yes in admitted.items() if not yes]
    text = f"Admitted measures (truth at 0.95 or more, frozen and loop at most by chance): {', '.join(good) or 'none'}."
    return text + (f" Not admitted: {', '.join(bad)}." if bad else "")
