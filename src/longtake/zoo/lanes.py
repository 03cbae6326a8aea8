"""A world that has to be remembered: actors on four lanes go behind pillars and come back as they were.

Every lane is a track with a pillar in its middle. An actor leaves the pillar on one side, walks to the track's end,
turns, and goes behind the pillar again, for a gap of 1 to 64 latent frames. A bar on the pillar says on which side it
will come out and, in the last eight latent frames, when: so a lawful return needs only the recent past, and the actor's
colour and texture need the frames before it hid. The caption names shapes only. Some actors are first seen after the
beginning, some are repainted once while they are in view. Behind every lane a frieze of landmarks pans to and fro, and
a clock in the corner never stands still. All but the clock move as drawn films do, once in every latent frame: a tiny
autoencoder keeps what stands still for four pixel frames, and blurs what does not.

Everything is a closed formula of the frame number and the seed: any frame can be drawn without the ones before it.
Events lie on the borders of latent frames (latent frame 0 is pixel frame 0, latent frame k > 0 is pixel frames 4 k - 3
to 4 k), so gaps and visits are whole numbers of latent frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from longtake.errors import LongtakeError

FPS = 16
WORLD = "lanes"  # its name in a model's longtake.json
SIZE = 128  # pixels, height and width
LANES = 4
LANE = SIZE // LANES  # pixels, height of a lane
TRACK = 112  # pixels; the columns to its right are a panel
RADIUS = 10
FRIEZE = 8  # pixels at the top of a lane
CENTRE = FRIEZE + (LANE - FRIEZE) // 2  # pixels, an actor's centre below the top of its lane
PILLAR = 32  # pixels, width
STRIDE = 4  # pixel frames in a latent frame
SINK = 3  # latent frames of the chunk that attention sinks keep
GAPS = (1, 2, 4, 8, 16, 32, 64)  # latent frames
WARNING = 8  # latent frames before a return in which the bar runs down
TURN = 48  # pixel frames in a turn of the clock

SHAPES = ("ball", "square", "triangle", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 60),
    "green": (40, 180, 60),
    "cyan": (60, 220, 225),
    "blue": (50, 80, 240),
    "magenta": (225, 70, 215),
    "white": (245, 245, 245),
}
TEXTURES = ("plain", "dot", "band", "bar")
WALLS = ((70, 80, 96), (104, 92, 76), (66, 90, 72), (92, 74, 92))
PALETTE = np.array(list(COLOURS.values()), np.float32)
_MARK = np.array((25, 25, 25), np.float32)
_POST = np.array((38, 36, 44), np.float32)
_BAR = np.array((235, 235, 235), np.float32)
_PANEL = np.array((16, 16, 20), np.float32)


@dataclass(frozen=True)
class Look:
    """What has to be remembered of an actor: indices into COLOURS and TEXTURES."""

    colour: int
    texture: int


@dataclass(frozen=True)
class Visit:
    """A walk from the pillar and back, in latent frames: first in view, how many in view; `side` is -1 (left) or 1."""

    start: int
    frames: int
    side: int

    @property
    def end(self) -> int:
        """First latent frame behind the pillar again."""
        return self.start + self.frames


@dataclass(frozen=True)
class Lane:
    """One lane: `post` is the pillar's left edge in pixels; `visits` in order; `paint` the latent frame from which the
    actor looks like `painted`. `landmarks` are indices into COLOURS or -1, one for every 16 pixels of the frieze."""

    shape: str
    look: Look
    post: int
    wall: int
    visits: tuple[Visit, ...]
    landmarks: tuple[int, ...]
    pan: tuple[float, float]  # phase in pixels, pixels per latent frame
    paint: int | None = None
    painted: Look | None = None

    def looks(self, latent: int) -> Look:
        """The actor's look at a latent frame."""
        return self.painted if self.painted and self.paint is not None and latent >= self.paint else self.look

    def at(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For pixel frames [T]: centre in pixels (NaN behind the pillar), time to the next visit in latent frames (NaN
        in view, and after the last one), that visit's side, and whether the actor is painted anew."""
        time = (frames + STRIDE - 1) // STRIDE  # the latent frame
        starts = np.array([visit.start for visit in self.visits], float)
        index = np.searchsorted(starts, time, side="right") - 1
        lengths = np.array([visit.frames for visit in self.visits], float)
        sides = np.array([visit.side for visit in self.visits])
        now = index.clip(0)
        share = (time - starts[now] + 0.5) / lengths[now]
        out = (index >= 0) & (share < 1.0)
        reach = 1.0 - np.abs(2.0 * share - 1.0)  # 0 at the pillar, 1 at the end of the track
        left = self.post + RADIUS - reach * self.post
        right = self.post + PILLAR - RADIUS + reach * (TRACK - self.post - PILLAR)
        x = np.where(out, np.where(sides[now] < 0, left, right), np.nan)
        following = index + 1
        waits = ~out & (following < len(self.visits))
        ahead = following.clip(0, len(self.visits) - 1)
        wait = np.where(waits, starts[ahead] - time, np.nan)
        painted = time >= self.paint if self.paint is not None else np.zeros(time.shape, bool)
        return x, wait, sides[ahead], painted

    def draw(self, frames: np.ndarray) -> np.ndarray:
        """Float pixels [T, LANE, TRACK, 3] of pixel frames [T]."""
        x, wait, side, painted = self.at(frames)
        image = np.empty((len(frames), LANE, TRACK, 3), np.float32)
        image[:] = np.array(WALLS[self.wall], np.float32)
        image[:, LANE - 2 :] *= 0.6
        self._draw_frieze(image, frames)
        seen = ~np.isnan(x)
        if seen.any():
            colours = PALETTE[np.where(painted, (self.painted or self.look).colour, self.look.colour)][seen]
            cover, marks = coverage(self.shape, self.look.texture, x[seen])
            if self.painted:
                other = coverage(self.shape, self.painted.texture, x[seen])[1]
                marks = np.where(painted[seen][:, None, None], other, marks)
            body = colours[:, None, None, :] + marks[..., None] * (_MARK - colours[:, None, None, :])
            zone = image[:, FRIEZE:][seen]
            image[seen, FRIEZE:] = zone + cover[..., None] * (body - zone)
        post = image[:, FRIEZE:, self.post : self.post + PILLAR]
        post[:] = _POST
        bar = 2.0 * np.clip(np.nan_to_num(wait), 0.0, WARNING)  # pixels, from the edge where the actor comes out
        column = np.arange(PILLAR) + 0.5
        depth = np.where(side[:, None] < 0, column, PILLAR - column)  # pixels from that edge
        post[:, 8:16] += np.clip(bar[:, None] - depth + 0.5, 0.0, 1.0)[:, None, :, None] * (_BAR - _POST)
        return image

    def _draw_frieze(self, image: np.ndarray, frames: np.ndarray) -> None:
        room = 16.0 * len(self.landmarks) - TRACK
        offset = self.pan[0] + self.pan[1] * ((frames + STRIDE - 1) // STRIDE)
        offset = room - np.abs(offset % (2 * room) - room)  # to and fro
        place = np.arange(TRACK) + offset[:, None]
        plain = 0.5 * np.array([WALLS[self.wall]], np.float32)
        table = np.concatenate([0.5 * PALETTE + 0.5 * plain, plain])
        low = np.floor(place - 0.5).astype(int)
        mix = (place - 0.5 - low).astype(np.float32)[..., None]
        slots = np.array(self.landmarks)
        colour = [table[slots[np.clip(k // 16, 0, len(slots) - 1)]] for k in (low, low + 1)]
        image[:, : FRIEZE - 1] = ((1 - mix) * colour[0] + mix * colour[1])[:, None]
        image[:, FRIEZE - 1] *= 0.6


@dataclass(frozen=True)
class Scene:
    """Four lanes, some of them without an actor (None), the colour of every lane's wall, the clock's phase in turns."""

    lanes: tuple[Lane | None, ...]
    walls: tuple[int, ...]
    clock: float

    @property
    def caption(self) -> str:
        """The shapes from top to bottom, such as "a ball, a square and a triangle"; nothing else is told."""
        return caption([lane.shape for lane in self.lanes if lane])

    def angle(self, frames: np.ndarray) -> np.ndarray:
        """Direction of the clock's hand in turns at pixel frames."""
        return (self.clock + frames / TURN) % 1.0

    def render(self, frames: int, start: int = 0, offsets: Sequence[int] = (0,) * LANES) -> np.ndarray:
        """Pixel frames `start .. start + frames` as uint8 [frames, SIZE, SIZE, 3]; `offsets` sets every lane ahead by
        pixel frames of its own."""
        t = np.arange(start, start + frames)
        image = np.empty((frames, SIZE, SIZE, 3), np.float32)
        image[:] = _PANEL
        for i, (lane, wall, offset) in enumerate(zip(self.lanes, self.walls, offsets, strict=True)):
            strip = image[:, i * LANE : (i + 1) * LANE, :TRACK]
            if lane is None:
                strip[:] = np.array(WALLS[wall], np.float32)
                strip[:, LANE - 2 :] *= 0.6
                strip[:, :FRIEZE] *= 0.5
            else:
                strip[:] = lane.draw(t + offset)
        image[:, :16, TRACK:] = draw_clock(self.angle(t))
        return np.rint(image).clip(0, 255).astype(np.uint8)

    def disguised(self, seed: int) -> "Scene":
        """The same scene with every actor's colour and texture changed: the history of somebody else."""
        rng = np.random.default_rng([104729, seed])
        return replace(self, lanes=tuple(lane and _disguised(lane, rng) for lane in self.lanes))


def caption(shapes: Sequence[str]) -> str:
    """The sentence for the shapes from top to bottom."""
    names = [f"a {shape}" for shape in shapes]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nobody"


def scene(seed: int, latent_frames: int = 256, gaps: Sequence[int] = GAPS, repaint: float = 0.2) -> Scene:
    """The scene of a seed, with visits for at least `latent_frames` latent frames; same arguments, same scene.

    `gaps` are the latent frames that an actor may stay hidden for, `repaint` the share of actors repainted in view.
    Three lanes or all four have an actor, and half of the actors are first seen after the sink.
    """
    if latent_frames < 1 or not gaps or min(gaps) < 1:
        raise LongtakeError(
            f"latent_frames={latent_frames}, gaps={list(gaps)}: give at least one frame, gaps of 1 and up"
        )
    rng = np.random.default_rng([7927, seed])
    used = rng.permutation(LANES)[: int(rng.integers(3, LANES + 1))]
    late = set(rng.permutation(used)[: (len(used) + int(rng.integers(2))) // 2].tolist())
    walls = tuple(rng.integers(0, len(WALLS), LANES).tolist())
    lanes: list[Lane | None] = [None] * LANES
    for i in used.tolist():
        own = np.random.default_rng([7927, seed, i])  # a lane does not depend on how many others there are
        lanes[i] = _lane(own, walls[i], latent_frames, tuple(gaps), repaint, i in late)
    return Scene(tuple(lanes), walls, float(rng.random()))


def sample(seed: int, frames: int, start: int = 0) -> tuple[np.ndarray, str]:
    """Video uint8 [frames, SIZE, SIZE, 3] and caption of a seed, from pixel frame `start` on, 16 frames per second.

    Raises LongtakeError if `frames` is not positive or `start` is negative.
    """
    if frames < 1 or start < 0:
        raise LongtakeError(f"frames={frames}, start={start}: give at least one frame, and a start of 0 or later")
    chosen = scene(seed, latent_frames=(start + frames) // STRIDE + 2)
    return chosen.render(frames, start), chosen.caption


def coverage(shape: str, texture: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each pixel [T, LANE - FRIEZE, TRACK] that an actor centred at x [T] covers, and that its mark covers."""
    dx = (np.arange(TRACK, dtype=np.float32) + 0.5)[None, None, :] - x[:, None, None].astype(np.float32)
    dy = np.broadcast_to(
        (np.arange(LANE - FRIEZE, dtype=np.float32) + 0.5 - (CENTRE - FRIEZE))[None, :, None], (1, LANE - FRIEZE, 1)
    )
    r = float(RADIUS)
    if shape == "ball":
        distance = np.sqrt(dx * dx + dy * dy) - r
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * r
    elif shape == "diamond":
        distance = (np.abs(dx) + np.abs(dy)) * 0.75 - 0.8 * r
    else:
        low = dy - 0.25 * r  # centroid below the middle, so that the box around the triangle is centred
        distance = np.maximum(low, np.abs(dx) * 0.8660254 - low * 0.5) - 0.62 * r
    mark = {
        0: lambda: np.full_like(dx, 9.0),
        1: lambda: np.sqrt(dx * dx + dy * dy) - 4.5,
        2: lambda: np.abs(dy) - 3.0 + 0 * dx,
        3: lambda: np.abs(dx) - 3.0 + 0 * dy,
    }[texture]()
    return np.clip(0.5 - distance, 0.0, 1.0), np.clip(0.5 - mark, 0.0, 1.0)


def draw_clock(angle: np.ndarray) -> np.ndarray:
    """Float pixels [T, 16, 16, 3]: a disc whose one half is lit, for angles [T] in turns."""
    grid = np.arange(16, dtype=np.float32) + 0.5 - 8.0
    dx, dy = grid[None, None, :], grid[None, :, None]
    disc = np.clip(7.5 - np.sqrt(dx * dx + dy * dy) + 0.5, 0.0, 1.0)
    turn = 2 * np.pi * angle[:, None, None].astype(np.float32)
    lit = np.clip(dx * np.cos(turn) + dy * np.sin(turn) + 0.5, 0.0, 1.0)
    image = disc[..., None] * (
        np.array((60, 60, 90), np.float32) + lit[..., None] * np.array((190, 180, 120), np.float32)
    )
    return image + (1 - disc[..., None]) * _PANEL


def _lane(rng: np.random.Generator, wall: int, frames: int, gaps: tuple[int, ...], repaint: float, late: bool) -> Lane:
    post = int(rng.choice((32, 40, 48)))
    speed = float(rng.choice((8.0, 10.0, 12.0)))  # pixels per latent frame
    shape, look = str(rng.choice(SHAPES)), _look(rng)
    visits: list[Visit] = []
    side = int(rng.choice((-1, 1)))
    length = _length(post, side, speed)
    start = SINK + int(rng.integers(0, 6)) if late else -int(rng.integers(0, length - 2))
    while True:
        visits.append(Visit(start, length, side))
        start, side = start + length + int(rng.choice(gaps)), int(rng.choice((-1, 1)))
        length = _length(post, side, speed)
        if visits[-1].start > frames:
            break
    paint, painted = None, None
    draws = rng.random(2)  # drawn always, so that a scene without repaints is otherwise the same scene
    other = _look(rng)
    if draws[0] < repaint:
        chosen = visits[min(int(draws[1] * 2), len(visits) - 1)]
        paint = chosen.start + chosen.frames // 2
        if paint > 0:
            painted = replace(look, colour=other.colour if other.colour != look.colour else (look.colour + 3) % 8)
        else:
            paint = None
    landmarks = tuple(int(c) if rng.random() < 0.5 else -1 for c in rng.integers(0, len(COLOURS), 11))
    pan = (float(rng.uniform(0, 128)), float(rng.choice((1.0, 1.5, 2.0))))
    return Lane(shape, look, post, wall, tuple(visits), landmarks, pan, paint, painted)


def _length(post: int, side: int, speed: float) -> int:
    path = post - RADIUS + RADIUS if side < 0 else TRACK - post - PILLAR
    return max(4, round(2 * path / speed))


def _look(rng: np.random.Generator) -> Look:
    return Look(int(rng.integers(len(COLOURS))), int(rng.integers(len(TEXTURES))))


def _disguised(lane: Lane, rng: np.random.Generator) -> Lane:
    def other(look: Look) -> Look:
        colour = (look.colour + int(rng.integers(1, len(COLOURS)))) % len(COLOURS)
        return Look(colour, (look.texture + int(rng.integers(1, len(TEXTURES)))) % len(TEXTURES))

    return replace(lane, look=other(lane.look), painted=lane.painted and other(lane.painted))
