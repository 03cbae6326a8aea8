"""What a picture of the world of lanes shows, read from its pixels: the yardstick's eye.

A lane is read against what is lawful there (its pillar, its wall, its shape); nothing is taken from the model. An
actor's colour and texture are the pair that, drawn at the place where something stands, explains the pixels best.
"""

from dataclasses import dataclass

import numpy as np

from longtake.zoo import lanes
from longtake.zoo.lanes import FRIEZE, LANE, PALETTE, PILLAR, RADIUS, SIZE, STRIDE, TRACK, Lane, Scene

DIFFERENT = 30.0  # grey levels from the wall at which a pixel belongs to something
NARROWEST = 13  # pixels, of a whole actor
FAR = 8.0  # pixels from its lawful place at which an actor is elsewhere
LATE = 0.1  # turns by which a clock may be wrong

_WALLS = np.array(lanes.WALLS, np.float32)
_MARK = np.array((25, 25, 25), np.float32)


@dataclass(frozen=True)
class Reading:
    """One lane over T pixel frames, all arrays [T]: `count` things outside the pillar, centre `x` in pixels (NaN: none,
    or several), and of a whole, single actor `colour` and `texture` (-1: none, several, or half hidden)."""

    count: np.ndarray
    x: np.ndarray
    colour: np.ndarray
    texture: np.ndarray


def read(video: np.ndarray, scene: Scene, lane: int) -> Reading:
    """Read lane number `lane` of uint8 [T, SIZE, SIZE, 3]; it must have an actor by law, somewhere."""
    count, x, whole = locate(video, scene, lane)
    law = scene.lanes[lane]
    assert law is not None
    colour, texture = np.full(len(video), -1), np.full(len(video), -1)
    if whole.any():
        zone = video[whole, lane * LANE + FRIEZE : (lane + 1) * LANE, :TRACK].astype(np.float32)
        colour[whole], texture[whole] = _identify(zone, law, x[whole])
    return Reading(count, x, colour, texture)


def locate(video: np.ndarray, scene: Scene, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where something stands on a lane, not what: `count` and `x` of a `Reading`, and whether it is whole, all [T]."""
    law = scene.lanes[lane]
    if law is None:
        raise ValueError(f"lane {lane} has no actor to be read")
    zone = video[:, lane * LANE + FRIEZE : (lane + 1) * LANE, :TRACK].astype(np.float32)
    different = (np.abs(zone - _WALLS[law.wall]).max(-1) > DIFFERENT)[:, :-2].sum(1) >= 4  # [T, TRACK] columns
    different[:, law.post - 1 : law.post + PILLAR + 1] = False
    frames = len(video)
    count, x = np.zeros(frames, int), np.full(frames, np.nan)
    whole = np.zeros(frames, bool)
    for t in range(frames):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], different[t].astype(np.int8), [0]])))
        runs = [(a, b) for a, b in edges.reshape(-1, 2).tolist() if b - a >= 4]
        count[t] = len(runs)
        if len(runs) == 1:
            a, b = runs[0]
            x[t] = (a + b) / 2
            # half hidden: it touches the pillar
            whole[t] = (b - a >= NARROWEST and b < law.post - 1) or (b - a >= NARROWEST and a > law.post + PILLAR + 1)
    return count, x, whole


def clock(video: np.ndarray) -> np.ndarray:
    """Direction of the clock's hand in turns, 0..1, for uint8 [T, SIZE, SIZE, 3]."""
    face = video[:, :16, TRACK:].astype(np.float32).mean(-1)
    grid = np.arange(16, dtype=np.float32) + 0.5 - 8.0
    disc = (grid[None, :] ** 2 + grid[:, None] ** 2) < 49.0
    face = np.where(disc, face - face[:, disc].mean(1)[:, None, None], 0.0)
    return (
        np.arctan2((face * grid[None, :, None]).sum((1, 2)), (face * grid[None, None, :]).sum((1, 2)))
        / (2 * np.pi)
        % 1.0
    )


def clock_steps(hand: np.ndarray) -> np.ndarray:
    """How far the hand moved into each frame after the first, in turns from -1/2 to 1/2: [T - 1] for directions [T]."""
    return (np.diff(hand) + 0.5) % 1.0 - 0.5


def clock_error(video: np.ndarray, scene: Scene, start: int) -> np.ndarray:
    """Distance [T] in turns (at most a half) from the lawful clock, for frames that begin at pixel frame `start`."""
    error = clock(video) - scene.angle(np.arange(start, start + len(video)))
    return np.abs((error + 0.5) % 1.0 - 0.5)


@dataclass(frozen=True)
class Return:
    """A visit to be judged: its lane, its number, and the gap before it in latent frames."""

    lane: int
    visit: int
    gap: int

    def of(self, scene: Scene) -> tuple[Lane, lanes.Visit]:
        """The lane and the visit."""
        lane = scene.lanes[self.lane]
        assert lane is not None
        return lane, lane.visits[self.visit]


def returns(scene: Scene, first: int, last: int) -> list[Return]:
    """Returns (of actors seen before) whose first frame in view lies in latent frames [first, last)."""
    found = []
    for i, lane in enumerate(scene.lanes):
        for k in range(1, len(lane.visits) if lane else 0):
            assert lane is not None
            if first <= lane.visits[k].start < last:
                found.append(Return(i, k, lane.visits[k].start - lane.visits[k - 1].end))
    return found


@dataclass(frozen=True)
class Verdict:
    """How a return came out. `colour` and `texture` are right only where motion and clock are `lawful`."""

    lawful: bool
    colour: bool
    texture: bool
    missing: bool
    duplicated: bool
    distance: float  # pixels from the lawful place, median; NaN if missing


def judge(video: np.ndarray, scene: Scene, start: int, event: Return) -> Verdict | None:
    """Judge a return in frames that begin at pixel frame `start`; None if the actor is never lawfully whole in them."""
    lane, visit = event.of(scene)
    frames = np.arange(start, start + len(video))
    x = lane.at(frames)[0]
    here = (frames + STRIDE - 1) // STRIDE
    outside = (x < lane.post - RADIUS - 3) | (x > lane.post + PILLAR + RADIUS + 3)
    due = outside & (here >= visit.start) & (here < visit.end)
    if due.sum() < STRIDE:
        return None
    reading = read(video, scene, event.lane)
    seen = due & (reading.count > 0)
    missing = bool(seen.sum() < 0.5 * due.sum())
    duplicated = bool((due & (reading.count > 1)).sum() > 0.5 * due.sum())
    one = due & (reading.count == 1)
    distance = float(np.median(np.abs(reading.x - x)[one])) if one.any() else float("nan")
    lawful = not missing and not duplicated and distance <= FAR
    lawful = lawful and float(np.median(clock_error(video, scene, start))) <= LATE
    known = due & (reading.colour >= 0)
    wanted = [lane.looks(int(k)) for k in here]
    same = [reading.colour[t] == wanted[t].colour for t in np.flatnonzero(known)]
    alike = [reading.texture[t] == wanted[t].texture for t in np.flatnonzero(known)]
    right, fits = (bool(known.any() and np.mean(hits) > 0.5) for hits in (same, alike))
    return Verdict(lawful, lawful and right, lawful and fits, missing, duplicated, distance)


def off_actors(scene: Scene, start: int, frames: int) -> np.ndarray:
    """Bool [T, SIZE, SIZE]: pixels that no actor can touch now by law, the clock left out too."""
    free = np.ones((frames, SIZE, SIZE), bool)
    t = np.arange(start, start + frames)
    for i, lane in enumerate(scene.lanes):
        if lane is None:
            continue
        x = lane.at(t)[0]
        near = np.abs(np.arange(TRACK)[None] + 0.5 - x[:, None]) < RADIUS + 2
        free[:, i * LANE + FRIEZE : (i + 1) * LANE, :TRACK] &= ~near[:, None]
    free[:, :16, TRACK:] = False
    return free


def _identify(zone: np.ndarray, lane: Lane, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # For a texture the drawn picture is a + b * colour, so the squared error is a quadratic form in the colour.
    wall = _WALLS[lane.wall]
    errors = np.empty((len(zone), len(PALETTE), len(lanes.TEXTURES)))
    for texture in range(len(lanes.TEXTURES)):
        cover, mark = lanes.coverage(lane.shape, texture, x)
        near = (cover > 0)[..., None]
        rest = zone - wall * (1 - cover[..., None]) - _MARK * (cover * mark)[..., None]
        b = cover * (1 - mark)
        total = (rest**2 * near).sum((1, 2, 3))
        along = np.einsum("thwc,thw->tc", rest, b) @ PALETTE.T
        errors[:, :, texture] = total[:, None] - 2 * along + (b**2).sum((1, 2))[:, None] * (PALETTE**2).sum(1)
    best = errors.reshape(len(zone), -1).argmin(1)
    return best // len(lanes.TEXTURES), best % len(lanes.TEXTURES)
