"""From finished free takes to tables: one for each model and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import DEFINITIONS
from .adapters import imported_lpips, imported_vbench
from .against import likeness, reference_of
from .cells import Cell, Store, label_of
from .statistics import Hits
from .summary import estimate as _estimate
from .takes import TakeSetting

Found = list[tuple[int, Cell, dict[str, Any]]]  # cluster, cell, its content


def take_tables(todo: Sequence[Cell], store: Store, contents: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Tables as JSON values, of the finished cells, as `Store.finished` gives their `contents`; see `rows[]` for what
    is missing. Takes of one prompt and seed are kin: intervals draw them together."""
    groups: dict[tuple[Any, ...], dict[str, list[Cell]]] = {}
    for cell in todo:
        assert isinstance(cell.setting, TakeSetting)
        size = (cell.model, cell.setting.chunks, cell.setting.height, cell.setting.width)
        groups.setdefault(size, {}).setdefault(label_of(cell), []).append(cell)
    tables = []
    for (model, chunks, height, width), by_arm in groups.items():
        every = [cell for cells in by_arm.values() for cell in cells]
        prompts = list(dict.fromkeys(cell.setting.prompt for cell in every))  # type: ignore[union-attr]
        seeds = sorted({cell.seed for cell in every})
        place = lambda cell, prompts=prompts: (prompts.index(cell.setting.prompt), cell.seed)
        rows: list[dict[str, Any]] = []
        seconds: float | None = None
        fps: float | None = None
        for label, cells in by_arm.items():
            ordered = sorted(cells, key=place)
            kin = {at: number for number, at in enumerate(sorted({place(cell) for cell in every}))}
            found = [(kin[place(cell)], cell, contents[cell.key]) for cell in ordered if cell.key in contents]
            missing = len(ordered) - len(found)
            rows.append({"arm": label, **_identity(ordered[0]), "missing": missing, **_row(found, store)})
            for _, _, content in found[:1]:
                fps = content["outcome"]["fps"]
                seconds = round(content["outcome"]["frames"] / content["outcome"]["fps"], 3)
        tables.append({
            "model": model, "chunks": chunks, "seconds": seconds, "fps": fps, "height": height, "width": width,
            "prompts": prompts, "seeds": seeds, "rows": rows,
        })  # fmt: skip
    return tables


def _identity(cell: Cell) -> dict[str, Any]:
    told = cell.arm.as_dict()
    reference = reference_of(cell)
    return {
        "name": told["name"], "policy": list(told["policy"]), "budget": told["budget"],
        "reuse_name": told.get("reuse_name", "none"), "against": None if reference is None else label_of(reference),
    }  # fmt: skip


def _row(found: Found, store: Store) -> dict[str, Any]:
    row: dict[str, Any] = {"cells": [cell.key for _, cell, _ in found], "takes": len(found)}
    outcomes = {cell.key: content["outcome"] for _, cell, content in found}
    told = lambda values: estimate(_hits(found, values))
    for name in DEFINITIONS:
        if any(name in out["metrics"] for out in outcomes.values()):
            row[name] = told({key: _value(out["metrics"].get(name)) for key, out in outcomes.items()})
    pairs = {cell.key: likeness(store, cell) for _, cell, _ in found}
    row["against_missing"] = sum(reference_of(cell) is not None and pairs[cell.key] is None for _, cell, _ in found)
    for name, of_pair in (("psnr_db", "psnr"), ("ssim", "ssim")):
        if any(pairs.values()):
            row[name] = told({key: pair and pair[of_pair] for key, pair in pairs.items()})
    distances = {cell.key: imported_lpips(store.files(cell)) for _, cell, _ in found}
    if any(value is not None for value in distances.values()):
        row["lpips"] = told(distances)
    scores = {cell.key: imported_vbench(store.files(cell)) for _, cell, _ in found}
    for dimension in sorted({name for each in scores.values() for name in each}):
        row[f"vbench_{dimension}"] = told({key: each.get(dimension) for key, each in scores.items()})
    row["chunk_seconds"] = told({key: out["chunk_seconds"]["median"] for key, out in outcomes.items()})
    for name in ("realtime", "attended_total"):
        row[name] = told({key: out[name] for key, out in outcomes.items()})
    for name, part, rest in (
        ("reused_share", "reused", "forwards"), ("skipped_flops_share", "skipped_flops", "flops"),
    ):  # fmt: skip
        row[name] = told({key: _share(out[part], out[rest]) for key, out in outcomes.items()})
    row["attended_tokens"] = max((out["attended_tokens"] for out in outcomes.values()), default=0)
    for name in ("device", "total"):
        row[f"{name}_bytes"] = max((out["bytes"].get(name, 0) for out in outcomes.values()), default=0)
    seconds = [content["origin"]["seconds"] for _, _, content in found]
    row["seconds_per_cell"] = round(float(np.median(seconds)), 2) if seconds else None
    return row


def estimate(hits: Hits) -> dict[str, Any]:
    """As in other tables; without an interval where there is one prompt and seed only."""
    told = _estimate(hits)
    return {**told, "ci95": None} if len(hits) < 2 and told["n"] else told


def _hits(found: Found, values: Mapping[str, float | None]) -> Hits:
    """Values of cells by their kin."""
    hits: dict[int, list[float]] = {}
    for kin, cell, _ in found:
        if (value := values[cell.key]) is not None:
            hits.setdefault(kin, []).append(float(value))
    return hits


def _value(metric: Any) -> float | None:
    return metric["slope"] if isinstance(metric, dict) else metric


def _share(part: float, rest: float) -> float:
    """Of a part in part and rest."""
    return part / (part + rest) if part + rest else 0.0
