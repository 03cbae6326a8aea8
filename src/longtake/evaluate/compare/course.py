"""The course of a free run: what becomes of the actors that were seen, as the picture itself tells their comings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...zoo import lanes, readback
from .picture import off_actor_ssim, slopes

DRIFT = 0.1  # turns by which the clock may be off from the actor's last sight to its return
STEP = 1.0  # a clock step may be wrong by so many lawful ones


def course(video: np.ndarray, scene: lanes.Scene, start: int, chunk: int) -> dict[str, Any]:
    """Returns, first error and slow drift of uint8 [T, H, W, 3] from pixel frame `start` on, in chunks of `chunk`.

    An actor's return counts as recalled only where the clock ran lawfully since its last sight and for a turn before:
    a loop of what was true has lawful returns too, but its clock jumps. Actors that were never seen, or will be
    repainted in frames that a model is not shown, are left out.
    """
    begun = (start + lanes.STRIDE - 1) // lanes.STRIDE
    hand = np.concatenate([scene.angle(np.array([start - 1])), readback.clock(video)])
    steps = readback.clock_steps(hand)  # [T] turns into each frame; the law says 1 / TURN
    wrong = np.abs(steps * lanes.TURN - 1.0)
    drift = np.concatenate([[0.0], np.cumsum(steps - 1 / lanes.TURN)])
    returns: list[dict[str, Any]] = []
    for number, lane in enumerate(scene.lanes):
        if lane is None or not any(v.end >= 0 and v.start < begun - 1 for v in lane.visits):
            continue
        if lane.paint is not None and lane.paint >= begun:
            continue
        look = lane.looks(begun)
        reading = readback.read(video, scene, number)
        for left, visit in comings(reading.count > 0):
            known = [t for t in visit if reading.colour[t] >= 0]
            if len(known) < lanes.STRIDE:
                continue
            first, last = max(0, left - lanes.TURN), visit[-1] + 1
            lawful = bool(np.median(wrong[first:last]) < STEP and np.ptp(drift[first : last + 1]) <= DRIFT)
            returns.append({
                "lane": number, "gap": round((visit[0] - left) / lanes.STRIDE),
                "chunk": visit[0] // (lanes.STRIDE * chunk), "lawful": lawful,
                "colour": lawful and _mostly(reading.colour[known] == look.colour),
                "texture": lawful and _mostly(reading.texture[known] == look.texture),
                "duplicated": _mostly(reading.count[visit] > 1),
            })  # fmt: skip
    errors = [event["chunk"] for event in returns if not event["colour"]]
    return {
        "returns": returns, "chunks": len(video) // (lanes.STRIDE * chunk), "first_error": min(errors, default=None),
        "clock_lawful": round(float((wrong < STEP).mean()), 4), "background_ssim": off_actor_ssim(video, scene, start),
        **slopes(video),
    }  # fmt: skip


def comings(seen: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Every return in `seen` [T]: the frame from which somebody was hidden, for a latent frame or longer, and the
    frames [n] in view thereafter. Somebody who is hidden when it begins was last seen before frame 0."""
    left = 0
    visit: list[int] = []
    for t in range(len(seen) + 1):
        if t < len(seen) and seen[t]:
            visit.append(t)
        elif visit and (t == len(seen) or not seen[t : t + lanes.STRIDE].any()):
            if visit[0] - left >= lanes.STRIDE:
                yield left, visit
            left, visit = t, []


def _mostly(true: np.ndarray) -> bool:
    return bool(np.mean(true) > 0.5)
