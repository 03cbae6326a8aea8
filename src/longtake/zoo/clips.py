"""Training clips: encoded strips of lanes, dealt into ever new pictures.

Encoding is the dear part, and lanes do not know of each other: so films are encoded with every lane at a time of its
own, and a training window is put together from strips of different films. `short` windows are seven chunks on end, from
the beginning or from the middle of a take. `long` windows are sparse: the sink, two past chunks (one of them shows the
actor, half of the time), two recent ones and two to be learnt, as a bounded policy would show them hundreds of frames
into a take.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from longtake.zoo import lanes, tiny_vae

CHUNK = 3  # latent frames
CHUNKS = 7  # of a window
HORIZON = 200  # latent frames of a trajectory of `long`
WARM = 4  # latent frames encoded and thrown away before a piece that does not begin the take
ROWS = lanes.LANE // 8  # latent rows of a lane
SHORT_GAPS = (1, 1, 2, 2, 4, 4, 8)
LONG_GAPS = (1, 2, 4, 8, 8, 16, 16, 32, 32, 64)


@dataclass(frozen=True)
class Batch:
    """Windows of n chunks: latents [B, Z, 3 n, h, w], captions [B], temporal positions `frames` [B, 3 n], `actors`
    [B, 3 n, h, w], where actors are (1; 2 if not on their first visit), and `learn` [B, n], the weight of each chunk: 0
    where the window lacks the history that a real take would have."""

    latents: torch.Tensor
    captions: list[str]
    frames: torch.Tensor
    actors: torch.Tensor
    learn: torch.Tensor


@dataclass(frozen=True)
class Strip:
    """One lane of one film: latents [Z, 3 n, ROWS, w], actors [3 n, ROWS, w], first latent frame of each chunk."""

    shape: str | None
    latents: torch.Tensor
    actors: torch.Tensor
    chunks: tuple[int, ...]


class Library:
    """A growing shelf of encoded strips: kind → lane → strips."""

    def __init__(self, vae: AutoencoderKLWan, variant: str, seed: int) -> None:
        self.vae, self.variant, self.seed, self.films = vae, variant, seed, 0
        kinds = ("start", "middle") if variant == "short" else ("sparse",)
        self.shelf: dict[str, list[list[Strip]]] = {kind: [[] for _ in range(lanes.LANES)] for kind in kinds}

    def grow(self, films: int) -> None:
        """Add `films` new films."""
        for _ in range(films):
            rng = np.random.default_rng([self.seed, 5, self.films])
            kinds = list(self.shelf)
            kind = kinds[int(rng.choice(len(kinds), p=[0.4, 0.6] if len(kinds) == 2 else [1.0]))]
            for lane, strip in enumerate(self._film(rng, kind)):
                self.shelf[kind][lane].append(strip)
            self.films += 1

    def draw(self, rng: np.random.Generator, batch: int, chunks: int = CHUNKS) -> Batch:
        """`batch` windows of the last (of a middle) or first `chunks` chunks."""
        windows = [self._window(rng, chunks) for _ in range(batch)]
        stack = lambda k: torch.stack([window[k] for window in windows]).to(self.vae.device)  # type: ignore[misc]
        return Batch(stack(0).float(), [window[1] for window in windows], stack(2), stack(3), stack(4))

    def _window(
        self, rng: np.random.Generator, chunks: int
    ) -> tuple[torch.Tensor, str, torch.Tensor, torch.Tensor, torch.Tensor]:
        kinds = [kind for kind in self.shelf if min(map(len, self.shelf[kind]))]
        kind = kinds[int(rng.integers(len(kinds)))]
        strips = [shelf[int(rng.integers(len(shelf)))] for shelf in self.shelf[kind]]
        shapes = [strip.shape for strip in strips if strip.shape]
        starts = np.array(strips[int(rng.integers(len(strips)))].chunks)
        learn = np.ones(len(starts), np.float32)
        if kind == "start":
            picked = slice(0, chunks)
        elif kind == "middle":
            picked = slice(len(starts) - chunks, None)
            learn[picked.start] = 0.0
        else:
            picked = slice(None)
            learn[:-2] = 0.0
            if rng.random() < 0.5:  # right-packed: what is seen lies without gaps before what is made
                starts = starts[-1] - CHUNK * np.arange(len(starts))[::-1]
        index = slice((picked.start or 0) * CHUNK, None if picked.stop is None else picked.stop * CHUNK)
        frames = torch.from_numpy((starts[picked, None] + np.arange(CHUNK)).flatten())
        latents = torch.cat([strip.latents[:, index] for strip in strips], 2)
        actors = torch.cat([strip.actors[index] for strip in strips], 1)
        return latents, lanes.caption(shapes), frames, actors, torch.from_numpy(learn[picked])

    def _film(self, rng: np.random.Generator, kind: str) -> list[Strip]:
        gaps = SHORT_GAPS if kind != "sparse" else LONG_GAPS
        scene = lanes.scene(int(rng.integers(1 << 40)), HORIZON + 16, gaps)
        times = [self._times(rng, kind, lane) for lane in scene.lanes]
        pieces = []  # each: first latent frame of every lane, latent frames, warm-up
        if kind == "start":
            pieces = [([0] * lanes.LANES, CHUNKS * CHUNK, 0)]
        elif kind == "middle":
            pieces = [([t[0] for t in times], CHUNKS * CHUNK, WARM)]
        else:
            pieces = [([0] * lanes.LANES, CHUNK, 0)]
            pieces += [([t[i] for t in times], CHUNK, WARM) for i in (1, 2)]
            pieces += [([t[3] for t in times], 4 * CHUNK, WARM)]
        latents = torch.cat([self._encode(scene, *piece) for piece in pieces], 1)
        strips = []
        for i, lane in enumerate(scene.lanes):
            at = np.concatenate([np.arange(starts[i], starts[i] + length) for starts, length, _ in pieces])
            rows = slice(i * ROWS, (i + 1) * ROWS)
            actors = torch.from_numpy(_actors(lane, at))
            strips.append(Strip(lane.shape if lane else None, latents[:, :, rows].half(), actors, times[i]))
        return strips

    def _times(self, rng: np.random.Generator, kind: str, lane: lanes.Lane | None) -> tuple[int, ...]:
        """First latent frame of every chunk of a window."""
        if kind == "start":
            return tuple(range(0, CHUNKS * CHUNK, CHUNK))
        if kind == "middle":
            first = int(rng.integers(WARM, HORIZON - (CHUNKS + 1) * CHUNK))
            return tuple(range(first, first + CHUNKS * CHUNK, CHUNK))
        target = int(rng.integers(6 * CHUNK, HORIZON))
        evidence = int(rng.integers(CHUNK, target - 3 * CHUNK))
        back = [v for v in lane.visits if 6 * CHUNK <= v.start < HORIZON] if lane else []
        if lane and back and rng.random() < 0.75:  # somebody comes back in the chunks to be learnt
            visit = back[int(rng.integers(len(back)))]
            target = max(6 * CHUNK, visit.start - int(rng.integers(0, 4)))
            seen = [v for v in lane.visits if v.end - 4 > CHUNK and v.end < target - 2 * CHUNK]
            if seen and rng.random() < 0.7:
                old = seen[-1] if rng.random() < 0.6 else seen[int(rng.integers(len(seen)))]
                evidence = int(rng.integers(max(CHUNK, old.start), max(CHUNK, old.end - CHUNK) + 1))
            evidence = int(np.clip(evidence, CHUNK, target - 3 * CHUNK))
        other = int(rng.integers(CHUNK, target - 3 * CHUNK + 1))
        first, second = sorted((evidence, other))
        return (0, first, second, target - 2 * CHUNK, target - CHUNK, target, target + CHUNK)

    def _encode(self, scene: lanes.Scene, starts: list[int], length: int, warm: int) -> torch.Tensor:
        offsets = [lanes.STRIDE * (start - warm) for start in starts]
        video = scene.render(lanes.STRIDE * (length + warm - 1) + 1, 0, offsets)
        with torch.autocast(self.vae.device.type, torch.bfloat16):
            return tiny_vae.encode(self.vae, video[None]).float()[0, :, warm:]


def _actors(lane: lanes.Lane | None, latents: np.ndarray) -> np.ndarray:
    """Where the actor is, as uint8 [F, ROWS, w] on the latent grid, for latent frames [F]: 1, and 2 on a visit that is
    not its first, when there is something to be remembered."""
    where = np.zeros((len(latents), ROWS, lanes.SIZE // 8), np.uint8)
    if lane is None:
        return where
    back = latents >= (lane.visits[1].start if len(lane.visits) > 1 else np.inf)
    x = lane.at(lanes.STRIDE * latents)[0]
    cells = (np.arange(lanes.SIZE // 8) + 0.5) * 8
    near = np.abs(cells[None] - x[:, None]) < lanes.RADIUS + 4  # comparisons with NaN are false
    post = (cells > lane.post) & (cells < lane.post + lanes.PILLAR)
    where[:, lanes.FRIEZE // 8 :] = ((near & ~post) * (1 + back[:, None]))[:, None]
    return where
