"""Training windows for tiny-lumos: strips of codes, one lane of one film each, dealt into ever new pictures.

Encoding is the dear part, and lanes do not know of each other. A window is eight latent frames: from the `start` of a
take, from its `middle`, or `sparse`, as a bounded history shows them much later: the first frame, two that show an
actor before it hid, and five on end, in the last three of which it comes back.
"""

from dataclasses import dataclass

import numpy as np
import torch

from longtake.hosts.lumos.fsq_tokenizer import FSQTokenizer
from longtake.zoo import lanes
from longtake.zoo.tiny_lumos_tokenizer import encode

WINDOW = 8  # latent frames
KINDS = {"start": 0.35, "middle": 0.3, "sparse": 0.35}
LEARN = {"start": 8, "middle": 7, "sparse": 3}  # last frames of a window that have the history a real take would have
HORIZON = 128  # latent frames of a film
WARM = 3  # latent frames encoded and thrown away before a piece that does not begin the take
ROWS, COLUMNS = lanes.LANE // 8, lanes.SIZE // 8  # codes of a lane
GAPS = (1, 1, 2, 2, 4, 4, 8, 8, 16, 32, 64)


@dataclass(frozen=True)
class Strip:
    """One lane of one film: codes [WINDOW, ROWS, COLUMNS] (int16), `actors` of that shape (where one is), and the
    latent frame of each."""

    shape: str | None
    codes: torch.Tensor
    actors: torch.Tensor
    times: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Codes and actors [F, h, w], the shapes from top to bottom, temporal positions `frames`, last frames to learn."""

    codes: torch.Tensor
    actors: torch.Tensor
    shapes: tuple[str, ...]
    frames: tuple[int, ...]
    learn: int


class Library:
    """A growing shelf of encoded strips: kind → lane → strips."""

    def __init__(self, tokenizer: FSQTokenizer, seed: int) -> None:
        self.tokenizer, self.seed, self.films = tokenizer, seed, 0
        self.shelf: dict[str, list[list[Strip]]] = {kind: [[] for _ in range(lanes.LANES)] for kind in KINDS}

    def grow(self, films: int) -> None:
        """Add `films` new films; the first three are one of each kind."""
        kinds = list(KINDS)
        for _ in range(films):
            rng = np.random.default_rng([self.seed, 6, self.films])
            kind = kinds[self.films] if self.films < len(kinds) else str(rng.choice(kinds, p=list(KINDS.values())))
            for lane, strip in enumerate(self._film(rng, kind)):
                self.shelf[kind][lane].append(strip)
            self.films += 1

    def draw(self, rng: np.random.Generator, batch: int, frames: int = WINDOW) -> list[Window]:
        """`batch` windows whose captions name equally many shapes, so that they are equally long. Fewer `frames` than
        a window's are the first of a start or the last of a middle."""
        windows = [self._window(rng, frames)]
        while len(windows) < batch:
            other = self._window(rng, frames)
            if len(other.shapes) == len(windows[0].shapes):
                windows.append(other)
        return windows

    def _window(self, rng: np.random.Generator, frames: int) -> Window:
        kinds = {kind: share for kind, share in KINDS.items() if frames == WINDOW or kind != "sparse"}
        kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
        strips = [shelf[int(rng.integers(len(shelf)))] for shelf in self.shelf[kind]]
        part = slice(None, frames) if kind == "start" else slice(WINDOW - frames, None)
        places = np.array(strips[int(rng.integers(len(strips)))].times[part])
        if kind != "start":
            # As they are; or packed from the beginning; or, of a sparse one, packed before what is made.
            choice = rng.random()
            if choice < 0.4:
                places = np.arange(frames)
            elif choice < 0.6:
                places = places[-1] - np.arange(frames)[::-1]
        return Window(
            torch.cat([strip.codes[part] for strip in strips], 1).long(),
            torch.cat([strip.actors[part] for strip in strips], 1),
            tuple(strip.shape for strip in strips if strip.shape),
            tuple(places.tolist()),
            min(LEARN[kind], frames if kind == "start" else frames - 1),
        )

    def _film(self, rng: np.random.Generator, kind: str) -> list[Strip]:
        scene = lanes.scene(int(rng.integers(1 << 40)), HORIZON + 16, GAPS)
        times = [_times(rng, kind, lane) for lane in scene.lanes]
        pieces = []  # first column and length of each run of frames on end
        for run in ((0, 1), (1, 2), (3, 5)) if kind == "sparse" else ((0, WINDOW),):
            pieces.append(self._encode(scene, [t[run[0]] for t in times], run[1]))
        codes = torch.cat(pieces).to(torch.int16)  # [WINDOW, h, w]
        return [
            Strip(lane.shape if lane else None, codes[:, i * ROWS : (i + 1) * ROWS].clone(), actors_at(lane, t), t)
            for i, (lane, t) in enumerate(zip(scene.lanes, times, strict=True))
        ]

    def _encode(self, scene: lanes.Scene, starts: list[int], length: int) -> torch.Tensor:
        warm = WARM if min(starts) else 0
        offsets = [lanes.STRIDE * (start - warm) for start in starts]
        video = scene.render(lanes.STRIDE * (length + warm - 1) + 1, 0, offsets)
        return encode(self.tokenizer, video[None])[0, warm:].cpu()


def _times(rng: np.random.Generator, kind: str, lane: lanes.Lane | None) -> tuple[int, ...]:
    """Latent frames of a strip; those of one piece are on end."""
    if kind == "start":
        return tuple(range(WINDOW))
    back = [k for k in range(1, len(lane.visits) if lane else 0) if lane and 8 <= lane.visits[k].start < HORIZON]
    visit = int(rng.choice(back)) if back and rng.random() < 0.7 else None
    if kind == "middle":
        first = int(rng.integers(WARM, HORIZON - WINDOW))
        if visit is not None and lane:  # somebody comes back in the window
            first = max(WARM, lane.visits[visit].start - int(rng.integers(2, WINDOW)))
        return tuple(range(first, first + WINDOW))
    target = int(rng.integers(12, HORIZON))
    seen = int(rng.integers(WARM, target - 6))
    if visit is not None and lane:
        target = max(12, lane.visits[visit].start - int(rng.integers(2)))
        old = lane.visits[visit - 1]
        seen = int(rng.integers(max(WARM, old.start), max(WARM, old.end - 2) + 1))
    seen = int(np.clip(seen, WARM, target - 4))
    return (0, seen, seen + 1, *range(target - 2, target + 3))


def actors_at(lane: lanes.Lane | None, times: tuple[int, ...]) -> torch.Tensor:
    """Where the actor is, as bool [F, ROWS, COLUMNS]."""
    where = np.zeros((len(times), ROWS, COLUMNS), bool)
    if lane is not None:
        x = lane.at(lanes.STRIDE * np.array(times))[0]
        cells = 8 * np.arange(COLUMNS) + 4
        near = np.abs(cells[None] - x[:, None]) < lanes.RADIUS + 4  # comparisons with NaN are false
        near &= ~((cells > lane.post) & (cells < lane.post + lanes.PILLAR))
        where[:, lanes.FRIEZE // 8 :] = near[:, None]
    return torch.from_numpy(where)
