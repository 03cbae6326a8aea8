"""The true frames of a comparison: scenes, their latents, and the returns that are worth generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ...decoding import encode
from ...hosts.base import Host
from ...zoo import lanes, readback
from ..provenance import write_atomically

FIRST_SEED = 1 << 41  # training draws its scenes below 1 << 40
PIECE = 64  # latent frames encoded at once
WARM = 4  # latent frames encoded or decoded for the state of the autoencoder, and thrown away
PROBES = 8  # places of one scene where generation starts, at most


@dataclass(frozen=True)
class Probe:
    """Generation starts at latent frame `frame`; `events` are the returns that fall into it."""

    frame: int
    events: tuple[readback.Return, ...]


def scene_of(seed: int, frames: int, gaps: Sequence[int]) -> lanes.Scene:
    """The scene of a comparison's seed; a chunk or two longer than its true frames."""
    return lanes.scene(FIRST_SEED + seed, frames + 16, gaps)


def probes(scene: lanes.Scene, frames: int, chunk: int, chunks: int = 2) -> list[Probe]:
    """Where to generate `chunks` chunks after at most `frames` true latent frames, in time order; where there are too
    many, long gaps come first: they are rare.

    A probe lies on the border of a chunk, and at least one return begins in its first chunk.
    """
    found = []
    for frame in range(2 * chunk, frames - frames % chunk + 1, chunk):
        if events := readback.returns(scene, frame, frame + chunk):
            found.append(Probe(frame, tuple(events)))
    chosen = sorted(found, key=lambda probe: -max(event.gap for event in probe.events))[:PROBES]
    return sorted(chosen, key=lambda probe: probe.frame)


def true_latents(host: Host, scene: lanes.Scene, frames: int, cache: Path | None = None) -> Tensor:
    """Latents [1, C, frames, h, w] of a scene from its beginning; kept in the file `cache`."""
    if cache is not None and cache.exists():
        return load_file(cache)["latents"]
    parts = []
    for first in range(0, frames, PIECE):
        warm = WARM if first else 0
        length = min(PIECE, frames - first) + warm
        begin = lanes.STRIDE * (first - warm)  # the piece's own frame 0 is a single pixel frame
        video = scene.render(lanes.STRIDE * (length - 1) + 1, begin)
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        parts.append(encode(host.vae, pixels).float().cpu()[:, :, warm:])  # type: ignore[attr-defined]
    latents = torch.cat(parts, 2)
    if cache is not None:
        write_atomically(cache, save({"latents": latents.contiguous()}))
    return latents


def pixels_of(host: Host, before: Tensor, latents: Tensor) -> np.ndarray:
    """uint8 [T, H, W, 3]: the frames of `latents` [1, C, f, h, w] that follow the latents `before`."""
    decoder = host.decoder()
    warm = before[:, :, -WARM:]
    if warm.shape[2]:
        decoder.push(warm)
    return decoder.push(latents)[0].cpu().numpy()
