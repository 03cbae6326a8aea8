"""The tables of free takes: what each arm makes of the same prompts and seeds, at what cost, and the takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import Take, read_take
from .table import Column, axis, table
from .text import escape, number, packed, view
from .videos import Videos

AGAINST = ("psnr_db", "ssim", "lpips")  # measures that need a reference
SPEED = (
    Column("chunk_seconds", "seconds a chunk", "lower"), Column("realtime", "× real time", "higher"),
    Column("skipped_flops_share", "FLOPs skipped", "higher", 100, unit="%"),
    Column("reused_share", "forwards reused", "", 100, unit="%"),
)  # fmt: skip
SPACE = (
    Column("device_bytes", "MiB on the device", "lower", 2**-20),
    Column("total_bytes", "MiB in all", "lower", 2**-20, "archives in host memory included"),
    Column("attended_tokens", "tokens attended, at most", "lower"),
)
PACKS = 8 * 2**20  # characters of what chunks saw, within one page


def section(
    number_: int, found: dict[str, Any], definitions: dict[str, Any], folder: Path | None, videos: Videos
) -> tuple[str, list[str]]:
    """Markup of a table, and the parts of the page that hold its data."""
    name, rows = f"takes-{number_}", found["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row.get("cells", ())))
    kept = {key: read_take(folder, key) for key in keys} if folder is not None else {}
    groups: dict[tuple[str, int], list[Take]] = {}
    for take in kept.values():
        groups.setdefault((take.prompt, take.seed), []).append(take)
    shown = videos.add(groups.values())
    parts, left_out = _packs(kept)
    qualities = _qualities(rows, definitions)
    data = {
        "rows": [_row(row, [*qualities, *SPEED, *SPACE]) for row in rows],
        "costs": [axis(column) for column in (*SPEED[:2], *SPACE)], "qualities": [axis(column) for column in qualities],
        "chance": {}, "connect": False, "fps": found["fps"], "chunks": found["chunks"], "height": found["height"],
        "takes": {
            key: {
                "prompt": take.prompt, "seed": take.seed, "curves": take.curves, "video": shown.get(key),
                "sight": f"sight-{key}" if take.sight and key not in left_out else None,
                "decisions": f"decisions-{key}" if take.decisions else None, "wrong": take.wrong,
            }
            for key, take in kept.items()
        },
    }  # fmt: skip
    costs = [*SPEED, *SPACE, Column("attended_total", "tokens attended, in all", "lower"),
             Column("seconds_per_cell", "s a take, all work")]  # fmt: skip
    small = "<p class=warn>One take a row: there are no intervals, and the order of rows may be chance.</p>"
    markup = (
        f"<section id={name} aria-labelledby={name}-title><h2 id={name}-title>{escape(title(found))}</h2>"
        f"{_facts(found)}{_gaps(rows, kept, folder, left_out)}"
        + (small if all((row.get("takes") or 0) < 2 for row in rows) else "")
        + "<h3>What came out</h3>"
        + table(f"{name}-quality", _CAPTION, rows, [Column("takes", "takes"), *qualities], _note)
        + "<h3>What it cost</h3>"
        + table(f"{name}-cost", _COST_CAPTION, rows, costs, _note)
        + "<h3>Quality against speed and memory</h3><p>The front joins the arms that no other beats in both. It is "
        "made of means: where intervals overlap, the order may be chance.</p><div class=pair>"
        + view(name, "tradeoff", "speed") + view(name, "tradeoff", "space") + "</div>" + view(name, "key")
        + _takes_views(name, kept, folder) + "</section>"
    )  # fmt: skip
    return markup, [packed(f"{name}-data", data), *parts]


_CAPTION = (
    "Mean of the takes above its 95 % interval: a bootstrap over prompt and seed, since arms share them. "
    "Bold in a box: the best mean of its column; where intervals overlap, the order may be chance."
)
_COST_CAPTION = "Speed is the mean of the takes, memory the most that any of them held."


def title(found: dict[str, Any]) -> str:
    length = f"{found['chunks']} chunks"
    if found.get("seconds"):
        length = f"{number(found['seconds'])} s ({length})"
    return f"{found['model']}, takes of {length}, {found['width']}×{found['height']}"


def _facts(found: dict[str, Any]) -> str:
    prompts = "".join(f"<li>{escape(prompt)}</li>" for prompt in found["prompts"])
    seeds = ", ".join(map(str, found["seeds"]))
    rate = f" Frames per second: {found['fps']:g}." if found.get("fps") else ""
    return (
        f"<p>{len(found['rows'])} arms, each with the same {len(found['prompts'])} prompts × {len(found['seeds'])} "
        f"seeds ({escape(seeds)}) and the same noise.{rate} Takes of different policies are different videos: PSNR, "
        "SSIM and LPIPS compare a take only to the one without reuse of the same policy, prompt and seed.</p>"
        f"<details><summary>Prompts</summary><ol>{prompts}</ol></details>"
    )


def _gaps(rows: list[dict[str, Any]], kept: dict[str, Take], folder: Path | None, left_out: set[str]) -> str:
    """What is not there, in words."""
    told = []
    for row in rows:
        if row.get("missing"):
            told.append(f"{row['arm']}: {row['missing']} of {row['missing'] + row['takes']} takes are missing.")
        if row.get("against_missing"):
            told.append(
                f"{row['arm']}: {row['against_missing']} of {row['takes']} takes have no reference "
                f"({row.get('against')}) to compare with, so PSNR and SSIM are means of the others."
            )
    if folder is None:
        told.append("The folder of the takes was not at hand: no videos, curves, memory maps or decisions.")
    for take in kept.values():
        if take.wrong:
            which = f"{take.prompt}, seed {take.seed}" if take.prompt else "prompt unknown"
            told.append(f"{take.key} ({which}): could not read {', '.join(take.wrong)}.")
    if left_out:
        told.append(
            f"What chunks saw is not shown for {len(left_out)} takes, or this file would be too large: "
            f"{', '.join(sorted(left_out))}."
        )
    listed = "".join(f"<li>{escape(line)}</li>" for line in told)
    return f"<div class=warn><p>Not complete:</p><ul>{listed}</ul></div>" if told else ""


def _packs(kept: dict[str, Take]) -> tuple[list[str], set[str]]:
    parts, left_out, size = [], set[str](), 0
    for key, take in kept.items():
        if take.decisions:
            parts.append(packed(f"decisions-{key}", take.decisions))
        if take.sight:
            part = packed(f"sight-{key}", take.sight)
            if size + len(part) > PACKS:
                left_out.add(key)
                continue
            size += len(part)
            parts.append(part)
    return parts, left_out


def _takes_views(name: str, kept: dict[str, Take], folder: Path | None) -> str:
    if folder is None or not kept:
        return ""
    markup = "<h3>Side by side</h3>" + view(name, "player")
    markup += "<h3>Over time, and chunk by chunk</h3>" + view(name, "curves")
    markup += "<h3>What each chunk saw of the past</h3>"
    if any(take.sight for take in kept.values()):
        markup += view(name, "sight")
    else:
        markup += "<p>No record of what chunks saw was found.</p>"
    markup += "<h3>Decisions about reuse</h3>"
    if any(take.decisions for take in kept.values()):
        return markup + view(name, "decisions")
    return markup + "<p>Every forward of every take was computed: no arm reuses.</p>"


def _qualities(rows: list[dict[str, Any]], definitions: dict[str, Any]) -> list[Column]:
    """Every measure that some row has: those with a definition first, then imported scores."""
    keys = [key for key in definitions if any(isinstance(row.get(key), dict) for row in rows)]
    keys += sorted({key for row in rows for key in row if key.startswith("vbench_")})
    columns = []
    for key in keys:
        told = definitions.get(key) or {
            "title": f"VBench: {key.removeprefix('vbench_').replace('_', ' ')}", "better": "higher", "unit": "",
            "text": "",
        }  # fmt: skip
        columns.append(Column(key, told["title"], told["better"], 1.0, told["text"], told["unit"]))
    return columns


def _row(row: dict[str, Any], columns: list[Column]) -> dict[str, Any]:
    return {
        "arm": row["arm"], "name": row["name"], "variant": _variant(row), "budget": row.get("budget"), "control": "",
        "takes": row.get("cells", []), "reuse": row.get("reuse_name", "none"),
        "values": {column.key: row.get(column.key) for column in columns},
    }  # fmt: skip


def _variant(row: dict[str, Any]) -> str:
    return "" if row.get("reuse_name", "none") == "none" else row["reuse_name"]


def _note(row: dict[str, Any], column: Column) -> str | None:
    """In place of a number: why it is not there, or that some of it is missing."""
    if column.key == "takes" and row.get("missing"):
        return f"{row['takes']}<small class=bad>{row['missing']} missing</small>"
    value = row.get(column.key)
    if column.key in AGAINST and not (isinstance(value, dict) and value.get("n")):
        if row.get("against") is None:
            return "<small>is its own reference</small>"
        return "<small>not measured</small>" if column.key == "lpips" else "<small class=bad>no reference</small>"
    return None if column.key != "seconds_per_cell" or value is not None else number(None)
