"""LPIPS and VBench over files: what is to be scored is written out, scores made in another environment are read back.
Neither is a dependency: each brings torchvision and a torch of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import LongtakeError
from ..provenance import read_json, write_atomically
from .against import reference_of
from .cells import Cell, Store, label_of
from .takes import VIDEO, TakeSetting
from .writing import writing

PAIRS, SCRIPT, LPIPS = "pairs.json", "score.py", "lpips.json"
PROMPTS, VIDEOS = "prompts.json", "videos"
LPIPS_SCORES, VBENCH_RESULTS = ("LPIPS scores", list), ("VBench results", dict)  # what a file is, its outermost kind
KEPT_VBENCH = "vbench.json"

_SCORE = '''"""Scores pairs.json with LPIPS (Zhang et al. 2018) into lpips.json. In an environment of its own:

    python -m venv lpips-env && lpips-env/bin/pip install lpips av
    lpips-env/bin/python score.py
"""

import json
import pathlib

import av
import lpips
import torch

here = pathlib.Path(__file__).resolve().parent
device = "cuda" if torch.cuda.is_available() else "cpu"
model = lpips.LPIPS(net="alex").to(device)


def frames(path):
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).to(device)
            yield picture.permute(2, 0, 1)[None].float() / 127.5 - 1


scores = []
for pair in json.loads((here / "pairs.json").read_text()):
    with torch.no_grad():
        each = [
            float(model(a, b))
            for a, b in zip(frames(here / pair["video"]), frames(here / pair["reference_video"]))
        ]
    scores.append({**pair, "lpips": sum(each) / len(each), "lpips_per_frame": each})
    (here / "lpips.json").write_text(json.dumps(scores))
'''


def export_lpips(todo: Sequence[Cell], store: Store, folder: Path) -> int:
    """Write pairs of videos, a list of them (`pairs.json`) and the script that scores it; how many pairs there are.
    Raises LongtakeError if there are none."""
    pairs, videos = [], dict[str, Cell]()
    for cell in todo:
        reference = reference_of(cell)
        if reference is None or cell not in store or reference not in store:
            continue
        videos |= {cell.key: cell, reference.key: reference}
        pairs.append({
            "cell": cell.key, "reference": reference.key, "arm": label_of(cell), "seed": cell.seed,
            "video": f"{VIDEOS}/{cell.key}.mp4", "reference_video": f"{VIDEOS}/{reference.key}.mp4",
        })  # fmt: skip
    if not pairs:
        raise LongtakeError(
            "there are no pairs for LPIPS: it compares takes with reuse to the same ones without, so let --reuse have "
            "none and another, and let the takes finish first"
        )
    with writing():
        (folder / VIDEOS).mkdir(parents=True, exist_ok=True)
        for key, cell in videos.items():
            shutil.copyfile(store.files(cell) / VIDEO, folder / VIDEOS / f"{key}.mp4")
        write_atomically(folder / SCRIPT, _SCORE.encode())
        write_atomically(folder / PAIRS, _json(pairs))
    return len(pairs)


def check_files(vbench: Sequence[Path], lpips: Path | None) -> None:
    """Raise LongtakeError for files that no scores can be taken from, before takes are made for them."""
    for file in vbench:
        _read(file, *VBENCH_RESULTS)
    if lpips is not None:
        _read(lpips, *LPIPS_SCORES)


def import_lpips(file: Path, todo: Sequence[Cell], store: Store) -> int:
    """Take over scores that `score.py` wrote; of how many cells. Raises LongtakeError for another file."""
    listed = _read(file, *LPIPS_SCORES)
    known = {cell.key: cell for cell in todo if cell in store}
    count = 0
    for entry in listed:
        try:
            key, reference, score = entry["cell"], entry["reference"], float(entry["lpips"])
            each = entry.get("lpips_per_frame")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise LongtakeError(f"{file}: no LPIPS scores; give the {LPIPS} that {SCRIPT} wrote") from None
        cell = known.get(key)
        other = None if cell is None else reference_of(cell)
        if cell is None or other is None or other.key != reference:
            continue
        content = {"reference": reference, "lpips": score, "lpips_per_frame": each}
        with writing():
            write_atomically(store.files(cell) / f"lpips-{reference}.json", _json(content))
        count += 1
    return _some(count, file)


def imported_lpips(folder: Path) -> float | None:
    """The LPIPS of a cell's folder, if one was imported."""
    for path in folder.glob("lpips-*.json"):
        found = _quietly(path)
        if isinstance(found, dict) and isinstance(found.get("lpips"), int | float):
            return float(found["lpips"])
    return None


def export_vbench(todo: Sequence[Cell], store: Store, folder: Path) -> int:
    """Write the takes as VBench reads them, and return how many: a folder for each row of the tables with

        videos/PROMPT-INDEX.mp4    as in VBench's own suite; INDEX counts the seeds from 0
        prompts.json               file name → prompt: `vbench evaluate --mode=custom_input --prompt_file`

    Raises LongtakeError if no take is finished."""
    prompts: dict[Path, dict[str, str]] = {}
    count = 0
    with writing():
        for place, cell in _places(todo).items():
            if cell in store:
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(store.files(cell) / VIDEO, target)
                assert isinstance(cell.setting, TakeSetting)
                prompts.setdefault(target.parent.parent, {})[target.name] = cell.setting.prompt
                count += 1
        for row, names in prompts.items():
            write_atomically(row / PROMPTS, _json(names))
    if not count:
        raise LongtakeError("no take is finished: run the comparison first, then export it")
    return count


def import_vbench(file: Path, todo: Sequence[Cell], store: Store) -> int:
    """Take over scores of a results file of VBench (`*_eval_results.json`: dimension → [mean, [{"video_path",
    "video_results"}, …]]) for videos that `export_vbench` wrote; of how many cells. Scores of several files add up.
    Raises LongtakeError for another file."""
    places = {str(place): cell for place, cell in _places(todo).items()}
    scores: dict[str, dict[str, float]] = {}
    cells: dict[str, Cell] = {}
    for dimension, told in _read(file, *VBENCH_RESULTS).items():
        if not isinstance(told, list) or len(told) != 2 or not isinstance(told[1], list):
            raise LongtakeError(f"{file}: no VBench results; give a file whose name ends in _eval_results.json")
        for entry in told[1]:
            try:
                place = str(Path(*Path(entry["video_path"]).parts[-3:]))
                score = float(entry["video_results"])
            except (KeyError, TypeError, ValueError):
                raise LongtakeError(f"{file}: a result of {dimension} has no video_path and video_results") from None
            cell = places.get(place)
            if cell is not None and cell in store:
                cells[cell.key] = cell
                scores.setdefault(cell.key, {})[str(dimension)] = score
    for key, found in scores.items():
        path = store.files(cells[key]) / KEPT_VBENCH
        with writing():
            write_atomically(path, _json({**imported_vbench(path.parent), **found}))
    return _some(len(scores), file)


def _places(todo: Sequence[Cell]) -> dict[Path, Cell]:
    """Where in an export every take has its place, finished or not: so what comes back finds its cell."""
    found: dict[Path, Cell] = {}
    counted: dict[Path, int] = {}
    for cell in todo:
        assert isinstance(cell.setting, TakeSetting)
        row = Path(_name(f"{cell.model} {label_of(cell)} {cell.setting.chunks} chunks", 120)) / VIDEOS
        stem = row / _name(cell.setting.prompt, 180)
        counted[stem] = counted.get(stem, -1) + 1
        found[stem.with_name(f"{stem.name}-{counted[stem]}.mp4")] = cell
    return found


def imported_vbench(folder: Path) -> dict[str, float]:
    """The VBench scores of a cell's folder by dimension."""
    found = _quietly(folder / KEPT_VBENCH)
    return {k: float(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _some(count: int, file: Path) -> int:
    if not count:
        raise LongtakeError(f"{file} has no score of a take of this comparison: give the same matrix and -o as for it")
    return count


def _read(path: Path, what: str, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path}: {what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, kind):
        raise LongtakeError(f"{path}: these are not {what}")
    return found


def _quietly(path: Path) -> Any:
    try:
        return read_json(path) if path.is_file() else None
    except LongtakeError:
        return None


def _name(text: str, most: int) -> str:
    """A text as a file name: what a path or a shell would take for something else becomes a space."""
    clean = re.sub(r'[/\\:*?"<>|\x00-\x1f]+', " ", text)
    return " ".join(clean.split())[:most].strip(". ") or "take"


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
