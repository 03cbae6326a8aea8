"""From finished cells to tables: one table for each model and protocol, never mixed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ...zoo import lanes
from . import arms as names
from .cells import Cell, label_of
from .statistics import Hits, holm, interval, mean, paired

CHANCE = {"colour": 1 / len(lanes.COLOURS), "texture": 1 / len(lanes.TEXTURES)}
TRUE_ENOUGH = 0.95
SHOWN = 2  # scenes whose videos are shown
# what is counted of a cell's outcome, and what arms are told apart by
COUNTED = {"A": ("events", "colour"), "B": ("returns", "colour"), "L": ("events", "nats")}
FULL, WINDOWS = "full", ("window:positions=slots", "window")  # what others are tested against; the first that is there


def summarise(
    todo: Iterable[Cell], contents: Mapping[str, dict[str, Any]], training_frames: dict[str, int],
    against: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tables as JSON values: `tables[]` with model, protocol, `rows[]`, `admitted` metrics; of the finished cells, as
    `Store.finished` gives their `contents`. `against` names a policy that the others are tested against too."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    arms: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in todo:
        if cell.key not in contents:
            continue
        label = label_of(cell)
        arms[cell.model, label] = cell.arm.as_dict()
        groups.setdefault((cell.model, cell.setting.protocol), {}).setdefault(label, []).append(contents[cell.key])
    tables = []
    for (model, protocol), by_arm in groups.items():
        make = {"A": _teacher_forced, "B": _free, "L": _asked}[protocol]
        rows = [
            {"arm": label, **arms[model, label], **make(found, training_frames[model]), **_shown(found)}
            for label, found in by_arm.items()
        ]
        _differences(rows, by_arm, protocol, against)
        told = {} if protocol == "L" else {"admitted": _admitted(rows), "chance": CHANCE}
        tables.append({"model": model, "protocol": protocol, "rows": rows, "admitted": {}, "chance": {}} | told)
    return {"tables": tables}


def _events(found: list[dict[str, Any]]) -> Callable[[Callable[[dict[str, Any]], bool], str], Hits]:
    """Of the events of cells that are to be kept, one of their values, by scene."""
    return lambda keep, key: {
        cell["seed"]: [float(e[key]) for e in cell["outcome"]["events"] if keep(e)] for cell in found
    }


def _by_gap(found: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """A value of the events of cells, estimated for each gap."""
    events, gaps = _events(found), sorted({e["gap"] for cell in found for e in cell["outcome"]["events"]})
    at: Callable[[int], Hits] = lambda gap: events(lambda e: e["gap"] == gap, key)
    return {str(gap): estimate(at(gap)) for gap in gaps}


def _teacher_forced(found: list[dict[str, Any]], training: int) -> dict[str, Any]:
    events = _events(found)
    everything = lambda e: True
    row: dict[str, Any] = {"events": sum(len(cell["outcome"]["events"]) for cell in found), "seeds": len(found)}
    for key in ("colour", "texture"):
        row[f"recall_{key}"] = estimate(events(everything, key))
        row[f"recall_{key}_in_range"] = estimate(events(lambda e: e["age"] <= training and not e["repainted"], key))
        row[f"recall_{key}_repainted"] = estimate(events(lambda e: e["repainted"], key))
        row[f"recall_{key}_far_in_sink"] = estimate(
            events(lambda e: e["age"] > training and e["in_sink"] and not e["repainted"], key)
        )
        row[f"recall_{key}_by_gap"] = _by_gap(found, key)
    for key in ("lawful", "missing", "duplicated"):
        row[key] = estimate(events(everything, key))
    distances = [e["distance"] for cell in found for e in cell["outcome"]["events"] if e["distance"] is not None]
    row["distance_px"] = round(float(np.median(distances)), 2) if distances else None
    row["psnr_db"] = estimate({cell["seed"]: cell["outcome"]["psnr"] for cell in found})
    return row | _cost(found)


def _asked(found: list[dict[str, Any]], training: int) -> dict[str, Any]:
    events = _events(found)
    row: dict[str, Any] = {"events": sum(len(cell["outcome"]["events"]) for cell in found), "seeds": len(found)}
    row["nats"] = estimate(events(lambda e: True, "nats"))
    row["nats_in_range"] = estimate(events(lambda e: e["age"] <= training and not e["repainted"], "nats"))
    row["nats_by_gap"] = _by_gap(found, "nats")
    for key in ("seen", "scenery"):
        row[f"nats_{key}"] = estimate({cell["seed"]: cell["outcome"][key] for cell in found})
    return row | _cost(found)


def _free(found: list[dict[str, Any]], training: int) -> dict[str, Any]:
    returns = lambda key: {cell["seed"]: [float(e[key]) for e in cell["outcome"]["returns"]] for cell in found}
    each = lambda key: {cell["seed"]: [cell["outcome"][key]] for cell in found}
    row: dict[str, Any] = {"events": sum(len(c["outcome"]["returns"]) for c in found), "seeds": len(found)}
    for key in ("colour", "texture", "duplicated"):
        row[key if key == "duplicated" else f"recall_{key}"] = estimate(returns(key))
    row["chunks_to_first_error"] = estimate({
        cell["seed"]: [float(cell["outcome"]["first_error"] if cell["outcome"]["first_error"] is not None
                             else cell["outcome"]["chunks"])] for cell in found
    })  # fmt: skip
    for key in ("clock_lawful", "background_ssim", "luma_slope", "contrast_slope"):
        row[key] = estimate(each(key))
    return row | _cost(found)


def _cost(found: list[dict[str, Any]]) -> dict[str, Any]:
    largest: Callable[[Iterable[int]], int] = lambda values: max(values, default=0)
    chunks = [cell["outcome"].get("chunk_seconds") for cell in found]
    known = [seconds for seconds in chunks if seconds is not None]
    return {
        "chunk_seconds": round(float(np.median(known)), 5) if known else None,
        "attended_tokens": largest(cell["outcome"]["attended_tokens"] for cell in found),
        "device_bytes": largest(cell["outcome"]["bytes"].get("device", 0) for cell in found),
        "total_bytes": largest(cell["outcome"]["bytes"].get("total", 0) for cell in found),
        "seconds_per_cell": round(float(np.median([cell["origin"]["seconds"] for cell in found])), 2),
    }


def _shown(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The cells of the first scenes, whose videos a report may show."""
    first = sorted((cell for cell in found if cell["outcome"].get("files")), key=lambda cell: cell["seed"])[:SHOWN]
    fps = first[0]["outcome"]["fps"] if first else None
    return {"cells": {str(cell["seed"]): cell["key"] for cell in first}, "fps": fps}


def estimate(hits: Hits) -> dict[str, Any]:
    """Number, mean and 95 % interval as JSON values; of nothing, the number alone."""
    count = sum(map(len, hits.values()))
    if not count:
        return {"n": 0}
    return {"n": count, "mean": round(mean(hits), 4), "ci95": _bounds(*interval(hits))}


def _bounds(low: float, high: float) -> list[float] | None:
    """An interval's ends; None where there is none, as of one scene."""
    return None if math.isnan(low) else [round(low, 4), round(high, 4)]


def made_by(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which code and machine the contents of finished cells come from, most cells first: a folder may have been filled
    by several runs."""
    counts: dict[str, int] = {}
    dates: dict[str, list[str]] = {}
    for content in found:
        origin = content["origin"]
        git, machine = origin.get("git") or {}, origin.get("machine") or {}
        told = {
            "commit": git.get("commit"), "dirty": git.get("dirty"), "cpu": machine.get("cpu"),
            "gpu": machine.get("gpu"), "torch": (origin.get("versions") or {}).get("torch"),
        }  # fmt: skip
        key = json.dumps(told)
        counts[key] = counts.get(key, 0) + 1
        dates.setdefault(key, []).append(str(origin.get("date", "")))
    return [
        {**json.loads(key), "cells": counts[key], "from": min(dates[key]), "to": max(dates[key])}
        for key in sorted(counts, key=lambda key: -counts[key])
    ]


def _differences(
    rows: list[dict[str, Any]], by_arm: dict[str, list[dict[str, Any]]], protocol: str, against: str | None = None
) -> None:
    """Paired differences (of colour recall; under L of nats) from full history, from a window of the same budget, and
    from the policy `against` at the same budget; each corrected for their number."""
    kind, value = COUNTED[protocol]
    hits = {
        label: {cell["seed"]: [float(e[value]) for e in cell["outcome"][kind]] for cell in found}
        for label, found in by_arm.items()
    }
    window = next((name for name in WINDOWS if any(row["name"] == name for row in rows)), None)
    at_budget = lambda name: {row["budget"]: row["arm"] for row in rows if row["name"] == name}
    windows, chosen = at_budget(window), at_budget(against)
    others: dict[str, Callable[[dict[str, Any]], str]] = {
        "against_full": lambda row: FULL, "against_window": lambda row: windows.get(row["budget"], ""),
        "against_chosen": lambda row: chosen.get(row["budget"], ""),
    }  # fmt: skip
    for key, other_of in others.items():
        pairs = [(row, other_of(row)) for row in rows if row["arm"] not in names.CONTROLS]
        pairs = [(row, other) for row, other in pairs if other in hits and other != row["arm"]]
        found = [paired(hits[row["arm"]], hits[other]) for row, other in pairs]
        ps = holm([p for _, _, p in found])
        for (row, other), (gap, (low, high), _), p in zip(pairs, found, ps, strict=True):
            if not math.isnan(gap):
                row[key] = {
                    "other": other,
                    "difference": round(gap, 4),
                    "ci95": _bounds(low, high),
                    "p_holm": round(p, 5),
                }


def _admitted(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """A metric may be used if the truth scores high in it and pictures without any generation score at most chance."""
    by_name = {row["control"]: row for row in rows if row["control"]}
    answer = {}
    for key, chance in CHANCE.items():
        value = lambda name, key=key: by_name.get(name, {}).get(f"recall_{key}", {}).get("mean", float("nan"))
        # a frozen picture may show no return at all
        idle = [found for found in (value(names.FROZEN), value(names.LOOP)) if not math.isnan(found)]
        answer[f"recall_{key}"] = bool(value(names.TRUTH) >= TRUE_ENOUGH and max(idle, default=0.0) <= chance)
    return answer
