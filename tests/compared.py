"""A small finished comparison, as `longtake compare` leaves it in its folder, made without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import longtake
from longtake.evaluate.metrics import DEFINITIONS

EVIL = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script> 'a' & \"b\""
PROMPTS = ("a red ball", EVIL)
FPS, CHUNKS, FRAMES = 8, 6, 24  # four pixel frames a chunk, three latent frames
ARMS = (("full", "none"), ("window:frames=6", "none"), ("packforcing", "none"), ("packforcing", "flowcache:slow"))
SIDE = 32
NO = {"n": 0}


def made(folder: Path, missing: tuple[int, ...] = ()) -> dict[str, Any]:
    """Write cells for ARMS × PROMPTS into `folder` but for those whose number is `missing`; the summary of it all."""
    rows = []
    for number, (policy, reuse) in enumerate(ARMS):
        keys = []
        for place, prompt in enumerate(PROMPTS):
            count = len(PROMPTS) * number + place
            if count not in missing:
                keys.append(f"{count:016x}")
                _cell(folder, keys[-1], policy, reuse, prompt, count)
        rows.append(_row(number, policy, reuse, keys))
    table = {
        "model": "tiny", "chunks": CHUNKS, "seconds": FRAMES / FPS, "fps": float(FPS), "height": SIDE, "width": SIDE,
        "prompts": list(PROMPTS), "seeds": [0], "rows": rows,
    }  # fmt: skip
    return {
        "command": f"longtake compare --prompt '{EVIL}'", "notes": ["full: a note", EVIL], "cells": 8,
        "finished": 8 - len(missing), "tables": [], "takes": [table],
        "definitions": {name: told.as_dict() for name, told in DEFINITIONS.items()},
        "origin": {"date": "2030-01-02T03:04:05", "machine": {"cpu": "a cpu"}, "git": {"commit": "abc"}},
    }  # fmt: skip


def _row(number: int, policy: str, reuse: str, keys: list[str]) -> dict[str, Any]:
    """Slower and better, arm by arm; the third, packforcing, is beaten by the second in both."""
    estimate = lambda mean: {"n": len(keys), "mean": mean, "ci95": [mean - 0.1, mean + 0.1]}
    drift, seconds, held = ((1.0, 4.0, 4), (2.0, 1.0, 1), (3.0, 2.0, 2), (5.0, 0.5, 2))[number]
    return {
        "arm": policy + (f" + {reuse}" if reuse != "none" else ""), "name": policy, "policy": [policy, {}],
        "reuse_name": reuse, "budget": None, "cells": keys, "takes": len(keys), "missing": len(PROMPTS) - len(keys),
        "against": None if reuse == "none" else policy, "against_missing": 0, "brightness_drift": estimate(-drift),
        "flicker": estimate(drift), "psnr_db": estimate(31.5) if reuse != "none" else {"n": 0},
        "chunk_seconds": estimate(seconds), "realtime": estimate(1 / seconds), "reused_share": estimate(0.25),
        "skipped_flops_share": estimate(0.2), "attended_total": estimate(1234.0), "attended_tokens": 100 * (number + 1),
        "device_bytes": held << 20, "total_bytes": held << 20, "seconds_per_cell": 1.5,
    }  # fmt: skip


def _cell(folder: Path, key: str, policy: str, reuse: str, prompt: str, shade: int) -> None:
    own = folder / "cells" / key
    own.mkdir(parents=True)
    with longtake.Mp4Writer(own / "take.mp4", FPS, SIDE, SIDE) as video:
        light = 60 + 2 * np.arange(FRAMES) + 10 * shade
        video.write(np.broadcast_to(light[:, None, None, None], (FRAMES, SIDE, SIDE, 3)).astype(np.uint8))
    decisions = lambda c: [
        {"chunk": c, "index": s, "timestep": 900.0 - s, "change": None if s == 0 else 0.1, "accumulator": 0.1 * s,
         "reused": s == 1, "reason": ("first", "still", "moved")[s]} for s in range(3)
    ]  # fmt: skip
    chunks = [
        {"index": c, "frame": 3 * c, "latent_frames": 3, "pixel_frame": 4 * c, "pixel_frames": 4, "seconds": 0.5,
         "forward_seconds": 0.3, "decode_seconds": 0.1, "compress_seconds": 0.0, "overhead_seconds": 0.1,
         "attended_tokens": 48 * (c + 1), "history_bytes": 1000 * c, "memory": {"device": 5000, "total": 5000 + c},
         "forwards": 3, "reused": int(reuse != "none"), "flops": {"total": 10**9}, "skipped_flops": {"total": 0},
         "decisions": decisions(c) if reuse != "none" else []}
        for c in range(CHUNKS)
    ]  # fmt: skip
    measures = {
        name: [None, *np.linspace(1, 2, FRAMES - 1)] for name in ("brightness", "contrast", "flicker", "motion")
    }
    files = {
        "chunks.json": chunks, "sight.json": {"columns": {}, "chunks": [_sight(policy, c) for c in range(CHUNKS)]},
        "frames.json": {"per_frame": measures, "repetition": {"lags": [4, 5, 6], "similarity": [0.1, 0.5, 0.2]}},
    }  # fmt: skip
    for name, content in files.items():
        (own / name).write_text(json.dumps(content))
    cell = {"key": key, "seed": 0, "setting": {"protocol": "takes", "prompt": prompt}, "outcome": {}, "origin": {}}
    (folder / "cells" / f"{key}.json").write_text(json.dumps(cell))


def _sight(policy: str, chunk: int) -> dict[str, Any]:
    """`full` sees all; a window its newest two blocks; packforcing sees the first in full, the second compressed and
    moved up, and holds, but does not show, what lies between them and the newest."""
    blocks = []
    for number in range(chunk):
        full = {"form": "full", "tokens": 48, "at": 3.0 * number, "share": 1.0}
        seen, held = [full], {"full": 48}
        if policy.startswith("window") and number < chunk - 2:
            continue
        if policy == "packforcing" and 1 <= number < chunk - 1:
            held = {"compressed": 6}
            seen = [{"form": "compressed", "tokens": 6, "at": 4.5, "share": 0.5}] if number == 1 else []
        blocks.append(
            {
                "id": number,
                "frame": 3 * number,
                "span": 3,
                "role": "committed",
                "tokens": 48,
                "held": held,
                "seen": seen,
            }
        )
    return {"index": chunk, "frame": 3 * chunk, "span": 3, "at": 3.0 * chunk, "tokens": 48, "blocks": blocks}


def estimate(mean: float, n: int = 40) -> dict[str, Any]:
    return {"n": n, "mean": mean, "ci95": [mean - 0.05, mean + 0.05]}


def films(folder: Path) -> list[str]:
    """Keys of the cells of a world, whose videos it puts into `folder`."""
    keys = [f"{number:016d}" for number in range(1000, 1004)]
    for shade, key in enumerate(keys):
        own = folder / "cells" / key
        own.mkdir(parents=True)
        with longtake.Mp4Writer(own / "take.mp4", FPS, SIDE, SIDE) as video:
            video.write(np.full((FRAMES, SIDE, SIDE, 3), 60 + 40 * shade, np.uint8))
    return keys


def world(keys: Sequence[str] = ()) -> dict[str, Any]:
    """A table of protocol A: the truth, full history, and a window at two budgets, as `summarise` makes it; `keys` are
    of the cells of its first scene."""
    row = lambda name, control, budget, recall: {
        "arm": name if budget is None else f"{name} @ {budget} KiB", "name": name, "control": control, "budget": budget,
        "policy": None, "events": 300, "seeds": 4, "recall_colour": estimate(recall), "recall_texture": NO,
        "recall_colour_by_gap": {"1": estimate(recall), "16": estimate(recall / 2), "64": estimate(0.1, n=2)},
        "attended_tokens": int(recall * 1000), "device_bytes": 1 << 20, "total_bytes": 2 << 20, "seconds_per_cell": 3.0,
        "psnr_db": estimate(20.0), "distance_px": 1.5, "lawful": estimate(0.9), "missing": NO, "duplicated": NO,
    }  # fmt: skip
    rows = [
        row("truth", "truth", None, 1.0),
        row("full", "", None, 0.8),
        row("window", "", 9, 0.3),
        row("window", "", 21, 0.6),
    ]
    for made, key in zip(rows, keys, strict=False):
        made |= {"cells": {"0": key}, "fps": FPS, "chunk_seconds": 0.5}
    rows[2]["against_full"] = {"other": "full", "difference": -0.5, "ci95": [-0.6, -0.4], "p_holm": 0.001}
    table = {
        "model": "tiny",
        "protocol": "A",
        "rows": rows,
        "admitted": {"recall_colour": True},
        "chance": {"colour": 0.125, "texture": 0.25},
    }
    return {"command": "c", "notes": [], "cells": 4, "finished": 4, "origin": {}, "tables": [table]}
