"""A world of moving shapes: exact, seeded, endless, and described truthfully by its captions.

One or two flat-coloured shapes move over a plain background. Every position is a closed formula of the frame number, so
any frame of any scene can be drawn without the frames before it, and a scene never ends. The caption names everything
that is visible (shape, colour, background; left to right at frame 0) and the kind of motion; sizes and speeds are left
to the seed.
"""

from dataclasses import dataclass

import numpy as np

from longtake.errors import LongtakeError

FPS = 16
SIZE = 64  # pixels, height and width

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (40, 185, 75),
    "blue": (50, 95, 240),
    "yellow": (245, 205, 45),
    "purple": (165, 65, 205),
    "white": (245, 245, 245),
}
SHAPES = ("ball", "square", "triangle", "ring")
MOTIONS = ("bouncing", "moving")

# background -> (words of the caption, colour of the top row, colour of the bottom row)
BACKGROUNDS: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int]]] = {
    "dark": ("on a dark background", (26, 26, 26), (26, 26, 26)),
    "light": ("on a light background", (205, 202, 192), (205, 202, 192)),
    "blue": ("over a blue background", (105, 165, 215), (105, 165, 215)),
    "night": ("at night", (8, 8, 30), (40, 38, 88)),
}
# Pairs that a viewer could not tell apart.
_INVISIBLE = {("white", "light"), ("blue", "blue"), ("blue", "night"), ("white", "blue")}


@dataclass(frozen=True)
class Actor:
    """One shape. Lengths in pixels, speeds in pixels per frame, `period` in frames, phases in pixels or periods."""

    shape: str
    colour: str
    radius: float
    speed: tuple[float, float]
    phase: tuple[float, float]
    period: float
    height: float

    def position(self, motion: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centre (x, y) in pixels at frame numbers `t` (any shape), y downwards."""
        low, high = self.radius + 1.0, SIZE - self.radius - 1.0
        x = _reflect(self.phase[0] + self.speed[0] * t, low, high)
        if motion == "bouncing":
            u = (self.phase[1] + t / self.period) % 1.0
            return x, high - self.height * 4.0 * u * (1.0 - u)
        return x, _reflect(self.phase[1] + self.speed[1] * t, low, high)

    def coverage(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Share of each pixel [T, SIZE, SIZE] that the shape covers, for centres x, y [T]; edges are one pixel soft."""
        grid = np.arange(SIZE, dtype=np.float32) + 0.5
        dx = grid[None, None, :] - x[:, None, None].astype(np.float32)
        dy = grid[None, :, None] - y[:, None, None].astype(np.float32)
        r = self.radius
        if self.shape == "ball":
            distance = np.sqrt(dx * dx + dy * dy) - r
        elif self.shape == "ring":
            distance = np.abs(np.sqrt(dx * dx + dy * dy) - 0.72 * r) - 0.28 * r
        elif self.shape == "square":
            distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * r
        else:
            # Equilateral, point up, centroid slightly below the centre so that the box around it is centred.
            dy = dy - 0.2 * r
            distance = np.maximum(dy, np.abs(dx) * 0.8660254 - dy * 0.5) - 0.62 * r
        return np.clip(0.5 - distance, 0.0, 1.0)


@dataclass(frozen=True)
class Scene:
    """A background, a motion and one or two actors; the last one is drawn in front."""

    background: str
    motion: str
    actors: tuple[Actor, ...]

    @property
    def caption(self) -> str:
        """The sentence that describes the scene, such as "a red ball bouncing on a dark background"."""
        names = " and ".join(f"a {actor.colour} {actor.shape}" for actor in self.actors)
        return f"{names} {self.motion} {BACKGROUNDS[self.background][0]}"

    def is_clear(self) -> bool:
        """Whether every actor stands out from the background and from the others."""
        colours = [actor.colour for actor in self.actors]
        return len(set(colours)) == len(colours) and not any((c, self.background) in _INVISIBLE for c in colours)

    def render(self, frames: int, start: int = 0) -> np.ndarray:
        """Frames `start .. start + frames` as uint8 [frames, SIZE, SIZE, 3]."""
        t = np.arange(start, start + frames, dtype=np.float64)
        _, top, bottom = BACKGROUNDS[self.background]
        ramp = np.linspace(0.0, 1.0, SIZE, dtype=np.float32)[:, None]
        column = np.array(top, np.float32) * (1.0 - ramp) + np.array(bottom, np.float32) * ramp  # [SIZE, 3]
        image = np.broadcast_to(column[None, :, None, :], (frames, SIZE, SIZE, 3)).copy()
        for actor in self.actors:
            alpha = actor.coverage(*actor.position(self.motion, t))[..., None]
            image += alpha * (np.array(COLOURS[actor.colour], np.float32) - image)
        return np.rint(image).astype(np.uint8)


def scene(seed: int) -> Scene:
    """The scene of a seed. Same seed, same scene, on every machine."""
    rng = np.random.default_rng([7919, seed])
    background = str(rng.choice(list(BACKGROUNDS)))
    motion = str(rng.choice(MOTIONS))
    visible = [colour for colour in COLOURS if (colour, background) not in _INVISIBLE]
    colours = rng.permutation(visible)[: rng.integers(1, 3)]
    slots = (SIZE / 2,) if len(colours) == 1 else (20.0, 44.0)
    return Scene(background, motion, tuple(_actor(rng, str(c), x, motion) for c, x in zip(colours, slots, strict=True)))


def sample(seed: int, frames: int, start: int = 0) -> tuple[np.ndarray, str]:
    """Video uint8 [frames, SIZE, SIZE, 3] and caption of a seed, from frame `start` on, 16 frames per second.

    Raises LongtakeError if `frames` is not positive or `start` is negative.
    """
    if frames < 1 or start < 0:
        raise LongtakeError(f"frames={frames}, start={start}: give at least one frame, and a start of 0 or later")
    chosen = scene(seed)
    return chosen.render(frames, start), chosen.caption


def _actor(rng: np.random.Generator, colour: str, x: float, motion: str) -> Actor:
    # Frame 0 finds every actor near its place, at the top of its hop or half-way up: a take has a beginning that its
    # caption nearly determines, which a sampler of few steps needs (it would average over places far apart).
    sign = rng.choice([-1.0, 1.0], size=2)
    y = rng.uniform(0.46, 0.54) if motion == "bouncing" else rng.uniform(29.0, 35.0)
    return Actor(
        shape=str(rng.choice(SHAPES)),
        colour=colour,
        radius=float(rng.uniform(9.0, 11.0)),
        speed=(float(sign[0] * rng.uniform(0.5, 1.5)), float(sign[1] * rng.uniform(0.5, 1.5))),
        phase=(float(x + rng.uniform(-3.0, 3.0)), float(y)),
        period=float(rng.uniform(24.0, 34.0)),
        height=float(rng.uniform(26.0, 38.0)),
    )


def _reflect(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """A straight walk folded into [low, high] by perfect reflections."""
    span = high - low
    return low + span - np.abs((position - low) % (2.0 * span) - span)
