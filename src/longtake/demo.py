"""The demo: a model's own prompts under several KV policies, far beyond the training length, into one folder.

    OUT/  index.html   contact_sheet.png   demo.json   one MP4 and one poster per take

Everything is made in a hidden folder beside OUT, which gets its name at the end: OUT is complete or as it was before.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import demo_page
from .chunk import Chunk
from .errors import LongtakeError
from .evaluate.provenance import cpu_times, provenance
from .geometry import Geometry
from .hosts.base import Host
from .policies import FullHistory, KVPolicy, SlidingWindow, available, describe
from .session import Session, default_policy, history_shape
from .video import Mp4Writer, contact_sheet, save_png

SECONDS = 12.0  # of video per take, unless the machine is too slow for it
BUDGET = 100.0  # seconds that all takes together may need; with loading and waste a demo stays below three minutes
COLUMNS = 8  # moments on the contact sheet
CELL = 128  # its cells' height in pixels
METHODS = ("packcache", "packforcing", "flowcache")  # beside full history and windows
MADE_BY = "longtake demo"

Tick = Callable[[str, int, int], None]  # what is being made, chunks done, chunks in all


def make_demo(
    out: Path, host: Host, *, prompts: Sequence[str] = (), policies: Sequence[KVPolicy] = (),
    seconds: float | None = None, seed: int = 0, tick: Tick = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder `out`, and return what demo.json holds.

    prompts: default: the first three that the model names. policies: default: `line_up`. seconds: of video per take;
    by default 12, or as much as the machine makes in about two minutes.
    Raises LongtakeError if `out` is there and no earlier demo, or cannot be written; nothing is left behind then.
    """
    check_out(out)
    prompts = list(prompts) or list(host.config.prompts[:3])
    if not prompts:
        raise LongtakeError(f"{host.name} names no example prompts: give at least one (--prompt)")
    entries, left_out = line_up(host) if not policies else ([(label_of(p), p) for p in dict.fromkeys(policies)], [])
    if len({label for label, _ in entries}) < len(entries):  # takes are told apart by their label
        raise LongtakeError(f"two policies are both called {_twice(label for label, _ in entries)}: rename one")
    started, others = time.perf_counter(), cpu_times()
    with _folder(out) as folder:
        geometry = host.geometry()
        per_chunk = chunk_seconds(host, prompts[0], seed)
        wanted = geometry.chunks(SECONDS if seconds is None else seconds)
        chunks = wanted
        if seconds is None:
            least = math.ceil(host.config.training_frames / geometry.chunk_frames) + 1  # beyond the training length
            affordable = int(BUDGET / (per_chunk * len(prompts) * len(entries)))
            chunks = max(min(least, wanted), min(wanted, affordable))
        takes: list[dict[str, Any]] = []
        rows: list[tuple[str, np.ndarray]] = []
        total = chunks * len(prompts) * len(entries)
        for number, prompt in enumerate(prompts):
            for place, (label, policy) in enumerate(entries):
                done = len(takes) * chunks
                name = f"{number + 1}-{place + 1}-{_slug(label)}"
                say = lambda n, done=done, label=label, prompt=prompt: tick(f"{label}: {prompt}", done + n, total)
                take, cells = _take(folder, name, host, policy, prompt, chunks, seed, say)
                takes.append({"prompt": prompt, "policy": label, **take})
                rows.append((f"{prompt} / {label}", cells))
        length = takes[0]["frames"] / geometry.fps
        # The rows hold the sheet's moments only, evenly spread: this rate puts the right times under them.
        rate = (len(rows[0][1]) - 1) / (length - 1 / geometry.fps) if len(rows[0][1]) > 1 else None
        save_png(folder / "contact_sheet.png", contact_sheet(rows, COLUMNS, CELL / geometry.height, fps=rate))
        spent = cpu_times()
        result = {
            "made_by": MADE_BY, "format": 1, "model": _model(host, geometry), "seed": seed, "seconds": length,
            "chunks": chunks, "shortened_from": wanted if chunks < wanted else None,
            "policies": [_summary(label, p, [t for t in takes if t["policy"] == label]) for label, p in entries],
            "left_out": left_out, "takes": takes, "threads": torch.get_num_threads(),
            "others_busy": others.others_until(spent) if others and spent else None,
            "wall_seconds": time.perf_counter() - started, **provenance(host.device),
        }  # fmt: skip
        result["files"] = sorted([*os.listdir(folder), "index.html", "demo.json"])
        (folder / "index.html").write_text(demo_page.page(result), encoding="utf-8")
        (folder / "demo.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def line_up(host: Host) -> tuple[list[tuple[str, KVPolicy]], list[dict[str, str]]]:
    """Labelled policies worth seeing side by side, and which known ones do not fit this model and why.

    Full history; the window the model was made for, as it is and with positions packed; a window of three chunks
    without sink; and the three methods that the library is about, fitted to the bytes of the model's window.
    """
    shape = history_shape(host, host.geometry())
    window = default_policy(host)
    chosen: list[KVPolicy] = [FullHistory(), window]
    budget = (window.capacity(shape) or 0) * shape.token_bytes
    if isinstance(window, SlidingWindow):
        chosen += [replace(window, positions="slots"), SlidingWindow(3 * shape.chunk_frames, sink=0)]
    left_out = []
    for name in METHODS:
        try:
            policy = available()[name]().fit(budget, shape)
            policy.check(shape)
            chosen.append(policy)
        except LongtakeError as error:
            left_out.append({"policy": name, "why": str(error)})
    return [(label_of(policy), policy) for policy in dict.fromkeys(chosen)], left_out


def label_of(policy: KVPolicy) -> str:
    """A policy in a few words."""
    if isinstance(policy, FullHistory):
        return "full history"
    if type(policy) is SlidingWindow:
        sink = f"sink {policy.sink}" if policy.sink else "no sink"
        return f"window {policy.frames}, {sink}" + ("" if policy.positions == "absolute" else f", {policy.positions}")
    name, options = describe(policy)
    defaults = {field.name: field.default for field in fields(policy)}
    changed = ", ".join(f"{key} {value}" for key, value in options.items() if value != defaults[key])
    return (name or type(policy).__name__) + (f" ({changed})" if changed else "")


def check_out(out: Path) -> None:
    """Raise LongtakeError unless `out` is free, empty, or an earlier demo with nothing added."""
    if not out.exists():
        if not out.absolute().parent.is_dir():
            raise LongtakeError(f"there is no folder {out.parent} for the demo; create it first")
        return
    if not out.is_dir() or out.is_symlink():
        raise LongtakeError(f"{out} is not a folder; choose another place for the demo")
    present = set(os.listdir(out))
    if not present:
        return
    try:
        earlier = json.loads((out / "demo.json").read_text())
        ours = set(earlier["files"]) if earlier["made_by"] == MADE_BY else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if strangers := sorted(present - ours):
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise LongtakeError(
            f"{out} holds what no demo wrote ({', '.join(strangers[:3])}{more}) and is not replaced; "
            "choose another folder: longtake demo OUT_DIR"
        )


def chunk_seconds(host: Host, prompt: str, seed: int) -> float:
    """Time of one chunk after the first, which loads kernels and allocates."""
    take = Session(host, prompt=prompt, seed=seed)
    next(take)
    return next(take).stats.seconds


def _take(
    folder: Path, name: str, host: Host, policy: KVPolicy, prompt: str, chunks: int, seed: int,
    say: Callable[[int], None],
) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
    """One take as an MP4 and a poster; its figures, and the frames of the contact sheet [n, H, W, 3]."""
    take = Session(host, policy, prompt=prompt, seed=seed, chunks=chunks)
    geometry = take.geometry
    frames = geometry.pixel_frames(chunks * geometry.chunk_frames)
    moments = np.linspace(0, frames - 1, min(COLUMNS, frames)).round().astype(int)
    cells: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    seen = 0
    with Mp4Writer(folder / f"{name}.mp4", geometry.fps, geometry.height, geometry.width) as video:
        for chunk in take:
            pixels = _pixels(chunk)
            video.write(pixels)
            cells += [pixels[m - seen] for m in moments if seen <= m < seen + len(pixels)]
            seen += len(pixels)
            stats = asdict(chunk.stats)
            rows.append({"end": seen / geometry.fps, **stats})
            say(len(rows))
    save_png(folder / f"{name}.png", cells[len(cells) // 2])
    seconds = take.stats.seconds
    return {
        "video": f"{name}.mp4", "poster": f"{name}.png", "frames": seen, "seconds": seconds,
        "chunks_per_second": len(rows) / seconds, "realtime_factor": seen / geometry.fps / seconds,
        "memory": take.memory(), "chunks": rows,
    }, np.stack(cells)  # fmt: skip


def _pixels(chunk: Chunk) -> np.ndarray:
    assert chunk.frames is not None
    return chunk.frames.numpy()


def _summary(label: str, policy: KVPolicy, takes: list[dict[str, Any]]) -> dict[str, Any]:
    """A policy's row of the table, over all its takes; per chunk the median, which a hiccup of the machine does not
    move."""
    columns = list(zip(*(t["chunks"] for t in takes), strict=True))  # chunk by chunk, over the takes
    middle = lambda key: [statistics.median(c[key] for c in column) for column in columns]
    seconds = sum(t["seconds"] for t in takes)
    name, options = describe(policy)
    times = middle("seconds")
    third = max(1, len(times) // 3)
    return {
        "label": label, "name": name, "options": options,
        "chunks_per_second": sum(len(t["chunks"]) for t in takes) / seconds,
        "realtime_factor": sum(t["chunks"][-1]["end"] for t in takes) / seconds,
        "early_seconds": statistics.median(times[:third]), "late_seconds": statistics.median(times[-third:]),
        "history_bytes": takes[0]["chunks"][-1]["history_bytes"], "memory": takes[0]["memory"],
        "attended_tokens": takes[0]["chunks"][-1]["attended_tokens"],
        "curves": {
            "end": middle("end"), "seconds": times, "forward_seconds": middle("forward_seconds"),
            "history_bytes": middle("history_bytes"),
        },
    }  # fmt: skip


def _model(host: Host, geometry: Geometry) -> dict[str, Any]:
    config = host.config
    return {
        "name": host.name, "about": config.about, "weight_bytes": host.memory(), "device": str(host.device),
        "dtype": str(host.dtype).removeprefix("torch."), "width": geometry.width, "height": geometry.height,
        "fps": geometry.fps, "chunk_frames": geometry.chunk_frames, "steps": len(config.timesteps),
        "training_seconds": geometry.pixel_frames(config.training_frames) / geometry.fps,
    }  # fmt: skip


def _twice(labels: Iterable[str]) -> str:
    return next(label for label, count in Counter(labels).items() if count > 1)


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place if all goes well, and is removed if not."""
    out = out.absolute()
    fresh, old = (out.with_name(f".longtake-{secrets.token_hex(6)}.{end}") for end in ("part", "old"))
    try:
        fresh.mkdir()
        yield fresh
        if out.exists():
            check_out(out)  # somebody may have put a file there meanwhile
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise LongtakeError(f"cannot write the demo to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
