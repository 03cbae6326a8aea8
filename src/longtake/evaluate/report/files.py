"""What a free take left in its folder, as much of it as a page can hold; what is not there, or damaged, is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import LongtakeError
from ..provenance import read_json

POINTS = 400  # of a curve
BLOCKS = 40_000  # of the sight of one take
CHUNK_COLUMNS = ("seconds", "forward_seconds", "decode_seconds", "overhead_seconds", "attended_tokens",
                 "history_bytes", "forwards", "reused")  # fmt: skip


@dataclass
class Take:
    """A take's files; `sight` and `decisions` are None where there is nothing to show."""

    key: str
    prompt: str
    seed: int
    video: Path | None = None
    curves: dict[str, Any] = field(default_factory=dict)
    sight: dict[str, Any] | None = None
    decisions: list[list[Any]] | None = None
    wrong: list[str] = field(default_factory=list)  # what could not be read


def read_take(folder: Path, key: str) -> Take:
    """Everything of the cell `key` of a comparison in `folder`; never raises for a file that is missing or damaged."""
    take = Take(key, "", 0)
    cell = _read(take, folder / "cells" / f"{key}.json", {})
    setting = cell.get("setting") or {}
    take.prompt, take.seed = str(setting.get("prompt", "")), int(cell.get("seed") or 0)
    own = folder / "cells" / key
    for name, use in (("chunks.json", _chunks), ("frames.json", _frames), ("sight.json", _sight)):
        content = _read(take, own / name, None)
        if content is None:
            continue
        try:
            use(take, content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            take.wrong.append(name)
    for path in sorted([*own.glob("against-*.json"), *own.glob("lpips-*.json")]):
        content = _read(take, path, {})
        for measure in ("psnr", "ssim", "lpips"):
            if isinstance(values := content.get(f"{measure}_per_frame"), list):
                take.curves[measure] = thin(values)
    if (own / "take.mp4").is_file():
        take.video = own / "take.mp4"
    else:
        take.wrong.append("take.mp4")
    return take


def thin(values: Sequence[float | None], points: int = POINTS) -> dict[str, Any]:
    """Means of `every` neighbours, so that at most `points` are left; None where all of them are."""
    every = -(-len(values) // points) or 1
    means = []
    for first in range(0, len(values), every):
        found = [value for value in values[first : first + every] if value is not None]
        means.append(float(f"{sum(found) / len(found):.5g}") if found else None)
    return {"every": every, "values": means}


def _read(take: Take, path: Path, otherwise: Any) -> Any:
    try:
        content = read_json(path)
    except LongtakeError:
        take.wrong.append(path.name)
        return otherwise
    if otherwise is not None and not isinstance(content, type(otherwise)):
        take.wrong.append(path.name)
        return otherwise
    return content


def _chunks(take: Take, chunks: list[dict[str, Any]]) -> None:
    columns: dict[str, list[Any]] = {name: [chunk.get(name) for chunk in chunks] for name in CHUNK_COLUMNS}
    columns["memory_total"] = [(chunk.get("memory") or {}).get("total") for chunk in chunks]
    columns["memory_device"] = [(chunk.get("memory") or {}).get("device") for chunk in chunks]
    columns["flops"] = [(chunk.get("flops") or {}).get("total") or None for chunk in chunks]
    for name, values in columns.items():
        if any(value is not None for value in values):
            take.curves[f"chunk_{name}"] = thin(values)
    made = [
        [chunk["index"], each["index"], int(each["reused"]), each.get("change"), each.get("accumulator"),
         each.get("timestep"), each.get("reason", "")]
        for chunk in chunks for each in chunk.get("decisions") or ()
    ]  # fmt: skip
    if made:
        take.decisions = made
    if not chunks:
        raise ValueError("a take without chunks")
    take.curves["chunk_starts"] = {"every": 1, "values": [chunk["pixel_frame"] for chunk in chunks]}


def _frames(take: Take, frames: dict[str, Any]) -> None:
    for name, values in frames["per_frame"].items():
        if values and any(value is not None for value in values):
            take.curves[name] = thin(values)
    repetition = frames.get("repetition") or {}
    if lags := repetition.get("lags"):
        every = -(-len(lags) // POINTS)
        take.curves["similarity"] = {"lags": lags[::every], "values": repetition["similarity"][::every]}


def _sight(take: Take, sight: dict[str, Any]) -> None:
    """Every chunk, or every so many of a take whose blocks would fill the page."""
    rows = sight["chunks"]
    count = sum(1 + len(row["blocks"]) for row in rows)
    every = -(-count // BLOCKS) or 1
    if rows:
        take.sight = {"every": every, "of": len(rows), "chunks": rows[::every]}
