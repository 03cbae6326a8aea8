"""What in a piece of video still moves by its law, whatever else became of the picture.

In the world of lanes an actor walks from its pillar to the end of the track and back: a passage is lawful if the place
of what is seen fits that walk, whenever it begins; and the clock makes a turn in a known time. Where a model has no
such world, the things of the commonest colour are followed: shapes that bounce have one horizontal speed between
bounces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..zoo import readback
from ..zoo.lanes import PILLAR, RADIUS, STRIDE, TRACK, TURN, Lane, Scene, Visit
from .compare.course import comings
from .metrics.meter import lawful_steps

TOLERANCE = 5.0  # pixels from its lawful place, at most: half a radius, or half of what it walks in a latent frame
FITS = 0.8  # of the frames in which a lawful actor is whole beside the pillar
TURN_OFF = 0.1  # turns by which the clock may be wrong after a turn
HALF = 0.5  # share of turns, or of steps, from which on something moves by its law

DIFFERENT = 30  # grey levels from the background at which a pixel belongs to something
ALIKE = 60  # grey levels from a colour at which a pixel still has it
LEAST = 0.002  # of a frame's pixels, to be a thing
STILL = 1 / 64  # of the width in a latent frame: what is slower does not move
SLACK = 0.5  # of the speed


@dataclass(frozen=True)
class Motion:
    """`lawful` of `seen` "passages" (world of lanes), or of "steps", each one latent frame long (no world). In the
    world of lanes also shares of the clock: of steps into a frame, and of whole turns, that are lawful; None if it is
    too short for a turn."""

    what: str
    lawful: int
    seen: int
    clock_steps: float | None = None
    clock_turns: float | None = None

    @property
    def moves(self) -> bool:
        """Whether at least one thing moves by its law."""
        if self.what == "steps":
            return self.seen > 0 and self.lawful >= HALF * self.seen
        return self.lawful > 0 or (self.clock_turns is not None and self.clock_turns >= HALF)

    def cell(self) -> str:
        """For people."""
        clock = "" if self.clock_turns is None else f", {self.clock_turns:.0%} of clock turns"
        return f"{self.lawful} of {self.seen} {self.what}{clock}"


# --- the world of lanes -----------------------------------------------------------------------------------------------


def of_lanes(video: np.ndarray, scene: Scene) -> Motion:
    """Passages and clock of uint8 [T, SIZE, SIZE, 3], which begins with a latent frame of four."""
    verdicts = [lawful for number, lane in enumerate(scene.lanes) if lane for lawful in passages(video, scene, number)]
    hand = readback.clock(video)
    return Motion(
        "passages", sum(verdicts), len(verdicts), round(float(lawful_steps(hand, TURN).mean()), 4), clock_turns(hand)
    )


def passages(video: np.ndarray, scene: Scene, number: int) -> list[bool]:
    """Of every coming and going on a lane that lies wholly in the video, whether it is a lawful walk.

    It is if there is a beginning for which the lawful actor, in `FITS` of the frames in which it is whole beside the
    pillar, is where the one thing that is seen is, within `TOLERANCE` pixels; and it is not in view for longer. What
    flickers for less than a latent frame is no passage.
    """
    law = scene.lanes[number]
    assert law is not None
    count, x, _ = readback.locate(video, scene, number)
    found = []
    for _, visit in comings(count > 0):
        if len(visit) >= STRIDE and visit[-1] < len(video) - STRIDE:
            found.append(_fits(np.where(count == 1, x, np.nan), law, visit))
    return found


def _fits(seen: np.ndarray, law: Lane, visit: list[int]) -> bool:
    """Whether the places [T] of the one thing that is seen (NaN: none, or several) fit a walk in the frames `visit`."""
    places = seen[visit]
    if np.isnan(places).all():
        return False
    side = -1 if np.nanmedian(places) < law.post + PILLAR / 2 else 1
    length = _length(law, side)
    if visit[-1] - visit[0] >= (length + 2) * STRIDE:
        return False
    walk = replace(law, visits=(Visit(0, length, side),))
    frames = np.arange(len(seen))
    for start in range(visit[0] - 3 * STRIDE, visit[0] + STRIDE + 1):
        x = walk.at(frames - start - STRIDE + 1)[0]  # latent frame 0 of the walk begins at pixel frame `start`
        due = (x < law.post - RADIUS - 3) | (x > law.post + PILLAR + RADIUS + 3)
        near = due & (np.abs(seen - x) <= TOLERANCE)
        if due.any() and near.sum() >= FITS * due.sum():
            return True
    return False


def _length(law: Lane, side: int) -> int:
    """Latent frames of a walk to that side; if the scene has none, those of the other side at the same speed."""
    known = {visit.side: visit.frames for visit in law.visits}
    path = {-1: law.post, 1: TRACK - law.post - PILLAR}
    return known.get(side) or max(4, round(known[-side] * path[side] / path[-side]))


def clock_turns(hand: np.ndarray) -> float | None:
    """Share of the stretches of a lawful turn's length over which the hand, in turns [T], came round once, give or take
    `TURN_OFF`; None for less than one such stretch."""
    steps = readback.clock_steps(hand)
    whole = len(steps) // TURN
    if not whole:
        return None
    turned = steps[: whole * TURN].reshape(whole, TURN).sum(1)
    return round(float((np.abs(turned - 1.0) <= TURN_OFF).mean()), 4)


# --- no world ---------------------------------------------------------------------------------------------------------


def of_steps(video: np.ndarray, stride: int, speed: float | None) -> Motion:
    """Steps of one latent frame, `stride` frames each, of the commonest colour's centre in uint8 [T, H, W, 3]: lawful
    are those whose horizontal length is within `SLACK` of `speed`, in pixels a latent frame; None is nobody's speed."""
    steps = _steps(video, stride)
    lawful = 0 if speed is None else int((np.abs(steps - speed) <= SLACK * speed).sum())
    return Motion("steps", lawful, len(steps))


def speed(video: np.ndarray, stride: int) -> float | None:
    """Median horizontal step in pixels a latent frame; None where nothing is followed, or it stands still."""
    steps = _steps(video, stride)
    if not len(steps) or np.isnan(steps).all():
        return None
    middle = float(np.nanmedian(steps))
    return middle if middle >= STILL * video.shape[2] else None


def _steps(video: np.ndarray, stride: int) -> np.ndarray:
    return np.abs(np.diff(centres(video)[::stride]))


def centres(video: np.ndarray) -> np.ndarray:
    """Horizontal centre in pixels [T] of what has the commonest colour among the pixels that are not background, which
    is the median over time; NaN where too little has it. What stands still for half of the time is background."""
    background = np.median(video[:: max(1, len(video) // 64)], 0)
    away = np.empty(video.shape[:3], bool)
    for t, frame in enumerate(video):
        away[t] = np.abs(frame - background).max(-1) > DIFFERENT
    if not away.any():
        return np.full(len(video), np.nan)
    pixels = video[away]
    coarse = (pixels >> 5).astype(np.int64) @ np.array((64, 8, 1))
    colour = pixels[coarse == np.bincount(coarse).argmax()].mean(0)
    columns = np.arange(video.shape[2]) + 0.5
    found = np.full(len(video), np.nan)
    for t, frame in enumerate(video):
        mask = away[t] & (np.abs(frame - colour).max(-1) < ALIKE)
        if (count := mask.sum()) >= LEAST * mask.size:
            found[t] = float(mask.sum(0) @ columns / count)
    return found
