"""The true frames of a comparison: scenes, their latents, and the returns that are worth generating."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...decoding import encode, half_on_cpu
from ...hosts.base import Decoder, Host
from ...zoo import lanes, readback
from ..provenance import write_atomically
from .writing import writing

FIRST_SEED = 1 << 41  # training draws its scenes below 1 << 40
PIECE = 64  # latent frames encoded at once
WARM = 4  # latent frames encoded or decoded for the state of the autoencoder, and thrown away
PROBES = 8  # places of one scene where generation starts, at most


@dataclass(frozen=True)
class Probe:
    """Generation starts at latent frame `frame`; `events` are the returns that fall into it."""

    frame: int
    events: tuple[readback.Return, ...]


class Footage:
    """The scene of one seed, and what all arms share of it: true latents, warm decoders, lawful pictures.

    `frames` latent frames may be asked for; latents are kept in the folder `cache`, if there is one.
    """

    def __init__(self, host: Host, seed: int, frames: int, gaps: Sequence[int], cache: Path | None = None) -> None:
        self.host, self.seed, self.frames, self.cache = host, seed, frames, cache
        self.scene = lanes.scene(FIRST_SEED + seed, frames + 16, gaps)
        self._latents: dict[tuple[int, bool], Tensor] = {}
        self._warm: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self._lawful: dict[tuple[int, int], np.ndarray] = {}
        # true latent frames from … to …, decoded, with what the decoder knows after them; see Projector
        self.film: dict[tuple[int, int], tuple[Tensor, tuple[dict[str, Tensor], dict[str, Any]]]] = {}

    def latents(self, frames: int, disguised: bool = False) -> Tensor:
        """True latents [1, C, frames, h, w] from the beginning, or those of the scene with everybody disguised."""
        if (found := self._latents.get((frames, disguised))) is None:
            name = f"{self.seed}-{self.frames}-{frames}{'-disguised' * disguised}.safetensors"
            scene = self.scene.disguised(self.seed) if disguised else self.scene
            found = true_latents(self.host, scene, frames, self.cache and self.cache / name)
            self._latents[frames, disguised] = found
        return found

    def pixels(self, frame: int, latents: Tensor) -> np.ndarray:
        """uint8 [T, H, W, 3]: the frames of `latents` [1, C, f, h, w] that follow the true latent frame `frame` - 1."""
        decoder = InHalf(self.host.decoder(), self.host)
        if frame not in self._warm:
            longest = max(found for found, disguised in self._latents if not disguised)
            if frame:
                decoder.push(self.latents(longest)[:, :, max(0, frame - WARM) : frame])
            self._warm[frame] = decoder.state_dict()
        else:
            decoder.load_state_dict(*self._warm[frame])
        return decoder.push(latents)[0].cpu().numpy()

    def true(self, frame: int, latents: Tensor) -> bool:
        """Whether `latents` [1, C, f, h, w] are the true ones from latent frame `frame` on, as far as known."""
        known = [found for (_, disguised), found in self._latents.items() if not disguised]
        return any(torch.equal(found[:, :, frame : frame + latents.shape[2]], latents.cpu()) for found in known)

    def lawful(self, start: int, frames: int) -> np.ndarray:
        """The true picture, pixel frames from `start` on."""
        if (start, frames) not in self._lawful:
            self._lawful[start, frames] = self.scene.render(frames, start)
        return self._lawful[start, frames]


@dataclass
class InHalf:
    """A decoder in half precision: see `half_on_cpu`."""

    decoder: Decoder
    host: Host

    def push(self, latents: Tensor) -> Tensor:
        with _fast(self.host):
            return self.decoder.push(latents)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.decoder.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.decoder.load_state_dict(tensors, meta)

    @property
    def nbytes(self) -> int:
        return self.decoder.nbytes


class Projector:
    """The decoder of a take on this footage, for compressors that are shown pixels. What it decodes of the true frames
    is kept by the footage, for all arms: most of their time would go there."""

    def __init__(self, footage: Footage) -> None:
        self.footage = footage
        self._decoder = InHalf(footage.host.decoder(), footage.host)
        self._frame: int | None = 0  # next latent frame, while all before were true

    def __deepcopy__(self, memo: dict[int, Any]) -> Projector:
        twin = Projector(self.footage)
        twin.load_state_dict(*self.state_dict())
        return twin

    def push(self, latents: Tensor) -> Tensor:
        first, self._frame = self._frame, None
        if first is None or not self.footage.true(first, latents):
            return self._decoder.push(latents)
        self._frame = first + latents.shape[2]
        if (known := self.footage.film.get((first, self._frame))) is None:
            frames = self._decoder.push(latents)
            self.footage.film[first, self._frame] = frames, self._decoder.state_dict()
            return frames
        frames, state = known
        self._decoder.load_state_dict(*state)
        return frames

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = self._decoder.state_dict()
        return tensors, {"decoder": meta, "frame": self._frame}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self._decoder.load_state_dict(tensors, meta["decoder"])
        self._frame = meta["frame"]

    @property
    def nbytes(self) -> int:
        return self._decoder.nbytes


def probes(scene: lanes.Scene, frames: int, chunk: int) -> list[Probe]:
    """Where to generate after at most `frames` true latent frames, in time order; where there are too many, long gaps
    come first: they are rare.

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
        with contextlib.suppress(SafetensorError, KeyError, OSError):  # a damaged file is made again
            return load_file(cache)["latents"]
    parts = []
    for first in range(0, frames, PIECE):
        warm = WARM if first else 0
        length = min(PIECE, frames - first) + warm
        begin = lanes.STRIDE * (first - warm)  # the piece's own frame 0 is a single pixel frame
        video = scene.render(lanes.STRIDE * (length - 1) + 1, begin)
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        with _fast(host):
            parts.append(_encoded(host, pixels).cpu()[:, :, warm:])
    latents = torch.cat(parts, 2)
    if cache is not None:
        with writing():
            write_atomically(cache, save({"latents": latents.contiguous()}))
    return latents


def has_codec(host: Host) -> bool:
    """Whether a model can turn frames into latents and back."""
    return getattr(host, "vae", None) is not None or getattr(host, "codec", None) is not None


def _encoded(host: Host, pixels: Tensor) -> Tensor:
    """Latents of float pixels [1, 3, T, H, W]: fp32, or the codes of a model that draws codes."""
    if host.codes:
        return host.codec.encode(pixels)  # type: ignore[attr-defined]
    return encode(host.vae, pixels).float()  # type: ignore[attr-defined]


def _fast(host: Host) -> contextlib.AbstractContextManager[Any]:
    """Half precision for the autoencoder, but not for codes, of which another one is another picture."""
    return contextlib.nullcontext() if host.codes else half_on_cpu(host.device)
