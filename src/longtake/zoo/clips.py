"""Training clips: encoded videos of the world, some of which change colour, shape or background half-way."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from longtake.zoo import tiny_vae, world
from longtake.zoo.tiny_text import SYNONYMS

CHUNK = 3  # latent frames
CHUNKS = 8  # per clip
FIRST_CHUNK = 4.0  # weight of a take's first chunk: it has no history to lean on, and everything after leans on it
SWITCH = 0.3  # share of clips whose caption changes


@dataclass(frozen=True)
class Batch:
    """Windows of n chunks: latents and `empty` (the same scenes without shapes) [B, Z, 3 n, h, w], captions [B][n],
    temporal positions `frames` [B, 3 n], and `learn` [B, n], the weight of each chunk: 0 where the window lacks the
    history that a real take would have."""

    latents: torch.Tensor
    empty: torch.Tensor
    captions: list[list[str]]
    frames: torch.Tensor
    learn: torch.Tensor


def pixel_frame(chunk: int) -> int:
    """First pixel frame that chunk `chunk` decodes to: latent frame 0 is one pixel frame, each later one four."""
    return max(0, 4 * CHUNK * chunk - 3)


def film(rng: np.random.Generator, start: int) -> tuple[np.ndarray, list[str]]:
    """A video uint8 [T, H, W, 3] of CHUNKS chunks from frame `start` on, and the caption in force at each chunk."""
    first, end = world.scene(int(rng.integers(1 << 30))), pixel_frame(CHUNKS)
    if rng.random() >= SWITCH:
        return first.render(end, start), [first.caption] * CHUNKS
    second, at = _changed(first, rng), int(rng.integers(1, CHUNKS))
    cut = pixel_frame(at)
    video = np.concatenate([first.render(cut, start), second.render(end - cut, start + cut)])
    return video, [first.caption] * at + [second.caption] * (CHUNKS - at)


class Library:
    """A growing shelf of encoded films."""

    def __init__(self, vae: AutoencoderKLWan, seed: int) -> None:
        self.vae, self.seed = vae, seed
        self.latents: list[torch.Tensor] = []
        self.captions: list[list[str]] = []
        self.starts: list[int] = []
        end = pixel_frame(CHUNKS)
        empty = np.stack([world.Scene(name, world.MOTIONS[0], ()).render(end) for name in world.BACKGROUNDS])
        self.empty = dict(zip(world.BACKGROUNDS, tiny_vae.encode(vae, empty).unbind(), strict=True))

    def grow(self, films: int) -> None:
        """Add `films` new films."""
        if not films:
            return
        rng = np.random.default_rng([self.seed, len(self.latents)])
        starts = [0 if rng.random() < 0.6 else int(rng.integers(1 << 12)) for _ in range(films)]
        made = [film(rng, start) for start in starts]
        with torch.autocast(self.vae.device.type, torch.bfloat16):
            latents = tiny_vae.encode(self.vae, np.stack([video for video, _ in made]))
        self.latents += latents.float().unbind()
        self.captions += [captions for _, captions in made]
        self.starts += starts

    def draw(self, rng: np.random.Generator, batch: int, chunks: int) -> Batch:
        """`batch` random windows of `chunks` chunks: from the start, from the middle, or a far sink and a middle."""
        windows = [self._window(rng, chunks) for _ in range(batch)]
        latents, empty, captions, frames, learn = zip(*windows, strict=True)
        places, learnt = (torch.stack(x).to(self.vae.device) for x in (frames, learn))
        return Batch(torch.stack(latents), torch.stack(empty), list(captions), places, learnt)

    def _window(
        self, rng: np.random.Generator, chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        i = int(rng.integers(len(self.latents)))
        kind = rng.choice(["start", "middle", "sink"], p=[0.7, 0.1, 0.2])
        first = 0 if kind == "start" and self.starts[i] == 0 else int(rng.integers(1, CHUNKS - chunks + 1))
        picked = list(range(first, first + chunks))
        shift = np.zeros(chunks, dtype=np.int64)
        learn = np.ones(chunks, dtype=np.float32)
        if first == 0:
            learn[0] = FIRST_CHUNK
        if kind == "sink" and first > 0 and self.starts[i] == 0:
            # The first chunk of the take stays visible while everything else moves on, for hundreds of frames.
            picked[0], learn[:2] = 0, 0.0
            shift[1:] = CHUNK * int(rng.integers(0, 200)) if rng.random() < 0.8 else 0
        elif first > 0:
            learn[0] = 0.0
        index = np.concatenate([np.arange(CHUNK * k, CHUNK * k + CHUNK) for k in picked])
        frames = torch.from_numpy(index + shift.repeat(CHUNK))
        told = [self.captions[i][k] for k in picked]
        behind = [next(name for name, (words, *_) in world.BACKGROUNDS.items() if words in caption) for caption in told]
        empty = torch.cat(
            [self.empty[name][:, CHUNK * k :][:, :CHUNK] for name, k in zip(behind, picked, strict=True)], 1
        )
        captions = [_reworded(caption, rng) for caption in told]
        return self.latents[i][:, index], empty, captions, frames, torch.from_numpy(learn)


def _changed(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    while True:
        which = int(rng.integers(len(scene.actors)))
        actors, background = list(scene.actors), scene.background
        kind = rng.choice(["background", "colour", "shape"])
        if kind == "background":
            background = str(rng.choice(list(world.BACKGROUNDS)))
        elif kind == "colour":
            actors[which] = replace(actors[which], colour=str(rng.choice(list(world.COLOURS))))
        else:
            actors[which] = replace(actors[which], shape=str(rng.choice(world.SHAPES)))
        changed = replace(scene, background=background, actors=tuple(actors))
        if changed != scene and changed.is_clear():
            return changed


def _reworded(caption: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.7:
        return caption
    words = caption.split()
    return " ".join(str(rng.choice(SYNONYMS[w])) if w in SYNONYMS and rng.random() < 0.5 else w for w in words)
