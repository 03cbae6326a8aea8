"""The protocols. A: true frames are committed under the policy, then two chunks are generated from noise that is the
same for all policies, at every probe. B: a short true beginning, then a free run far beyond the training length.
L: true frames are committed under the policy, and each is asked for before: how likely are its codes (likelihood.py)?

Of what was generated a cell keeps, in files: `take.mp4` (under A one probe's stretch after another; `probes` in its
outcome says at which true latent frame each begins), `latents.safetensors` (`latents`, fp32 [F, C, h, w]; controls that
use no model have none) and `chunks.json` (what every chunk cost).
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...chunk import Chunk
from ...hosts.base import Host
from ...session import Session
from ...video import Mp4Writer
from ...zoo import lanes, readback
from . import arms as names
from . import files, likelihood
from .arms import Arm
from .course import course
from .footage import Footage, Probe, Projector, probes
from .picture import psnr
from .writing import writing

CHUNKS, FRAMES = 2, 6  # generated at every probe, at least: so long an actor takes to be seen whole


@dataclass(frozen=True)
class Setting:
    """What every cell of a run shares: true latent frames at most, gaps of the scenes, frames of a free run."""

    protocol: str = "A"
    frames: int = 120
    gaps: tuple[int, ...] = lanes.GAPS
    free: int = 504

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def given(self, host: Host) -> int:
        """True latent frames before anything is generated, at most: a training clip before a free run."""
        chunk = host.config.chunk_frames
        limit = min(host.config.training_frames, self.frames) if self.protocol == "B" else self.frames
        return max(chunk, limit // chunk * chunk)

    def length(self, host: Host) -> int:
        """All latent frames of a cell's take."""
        chunk = host.config.chunk_frames
        follow = {"A": ahead(chunk), "B": self.free // chunk, "L": 0}
        return self.given(host) + chunk * follow[self.protocol]


def ahead(chunk: int) -> int:
    """How many chunks of so many latent frames are generated at a probe."""
    return max(CHUNKS, math.ceil(FRAMES / chunk))


class Made:
    """What a cell has generated."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.videos: list[np.ndarray] = []  # uint8 [T, H, W, 3]
        self.latents: list[Tensor] = []  # [f, C, h, w]
        self.chunks: list[dict[str, Any]] = []

    def add(self, chunk: Chunk) -> Tensor:
        """Note a chunk; its latents [1, C, f, h, w]."""
        told = chunk.stats
        self.chunks.append({
            "frame": told.frame, "latent_frames": told.latent_frames, "seconds": round(told.seconds, 6),
            "attended_tokens": told.attended_tokens, "history_bytes": told.history_bytes, "forwards": told.forwards,
            "reused": told.reused, "decisions": [asdict(decision) for decision in told.decisions],
        })  # fmt: skip
        self.latents.append(chunk.latents.float().cpu().transpose(0, 1))
        return chunk.latents[None]

    def write(self, folder: Path) -> None:
        """The files of the cell. Raises StoreError if they cannot be written."""
        with writing():
            if self.videos:
                with Mp4Writer(folder / files.VIDEO, self.fps, *self.videos[0].shape[1:3]) as video:
                    for frames in self.videos:
                        video.write(frames)
            if self.latents:
                save_file({"latents": torch.cat(self.latents).contiguous()}, folder / files.LATENTS)
            told = json.dumps(self.chunks, separators=(",", ":"), default=str)
            (folder / files.CHUNKS).write_text(told, encoding="utf-8")


def run(arm: Arm, footage: Footage, setting: Setting, folder: Path | None = None) -> dict[str, Any]:
    """One cell, as JSON values: `events` and the cost figures of protocols A and L, or the course of protocol B. What
    it generates is kept in `folder`."""
    made = Made(footage.host.geometry(lanes.SIZE, lanes.SIZE).fps)
    cell = {"A": teacher_forced, "B": free_run, "L": asked}[setting.protocol](arm, footage, setting, made)
    seconds = [chunk["seconds"] for chunk in made.chunks]
    cell |= {"fps": made.fps, "chunk_seconds": float(np.median(seconds)) if seconds else None}
    if folder is not None:
        made.write(folder)
    return cell


def teacher_forced(arm: Arm, footage: Footage, setting: Setting, kept: Made) -> dict[str, Any]:
    """Protocol A."""
    host, seed = footage.host, footage.seed
    chunk = host.config.chunk_frames
    truth = footage.latents(setting.length(host))
    shown = _shown(arm, footage, setting)
    take = None if arm.control in names.MODEL_FREE else _session(arm, footage, setting)
    cell: dict[str, Any] = {"events": [], "psnr": [], "attended_tokens": 0, "bytes": {}, "probes": []}
    for probe in probes(footage.scene, setting.given(host), chunk):
        if take is None:
            video = _without_model(arm.control, footage, truth, probe.frame, ahead(chunk) * chunk)
        else:
            while take.frame < probe.frame:
                take.extend(shown[:, :, take.frame : take.frame + chunk])
            made = []
            for generated in fork(take, 1000 * seed + probe.frame, ahead(chunk)):
                made.append(kept.add(generated))
                cell["attended_tokens"] = max(cell["attended_tokens"], generated.stats.attended_tokens)
            cell["bytes"] = held(take)
            video = footage.pixels(probe.frame, torch.cat(made, 2))
        start = lanes.STRIDE * (probe.frame - 1) + 1
        kept.videos.append(video)
        cell["probes"].append(probe.frame)
        cell["events"] += _judged(video, footage.scene, start, probe)
        cell["psnr"].append(psnr(video, footage.lawful(start, len(video))))
    return cell


def asked(arm: Arm, footage: Footage, setting: Setting, kept: Made) -> dict[str, Any]:
    """Protocol L; nothing is generated."""
    frames = setting.length(footage.host)
    truth, shown = footage.latents(frames), _shown(arm, footage, setting)
    take, account, tokens = _session(arm, footage, setting), likelihood.Account(footage.scene), 0
    for frame in range(1, frames):
        take.extend(shown[:, :, frame - 1 : frame])
        costs, attended = likelihood.nats(fork(take, footage.seed, 1), truth[:, :, frame : frame + 1])
        account.add(frame, costs)
        tokens = max(tokens, attended)
    return {"attended_tokens": tokens, "bytes": held(take), **account.as_dict()}


def free_run(arm: Arm, footage: Footage, setting: Setting, kept: Made) -> dict[str, Any]:
    """Protocol B."""
    host = footage.host
    chunk, given = host.config.chunk_frames, setting.given(host)
    free = setting.length(host) - given
    cell: dict[str, Any] = {"attended_tokens": 0, "bytes": {}}
    truth = footage.latents(given if arm.control != names.TRUTH else given + free)
    if arm.control in names.MODEL_FREE:
        video = _without_model(arm.control, footage, truth, given, free)
    else:
        take = _session(arm, footage, setting)
        take.extend(footage.latents(given, disguised=True) if arm.control == names.SHUFFLED else truth)
        made = []
        for generated in fork(take, footage.seed, free // chunk):
            made.append(kept.add(generated))
            cell["attended_tokens"] = max(cell["attended_tokens"], generated.stats.attended_tokens)
        cell["bytes"] = held(take)
        video = footage.pixels(given, torch.cat(made, 2))
    kept.videos.append(video)
    return cell | course(video, footage.scene, lanes.STRIDE * (given - 1) + 1, chunk)


def fork(take: Session, seed: int, chunks: int) -> Session:
    """A copy of the take in memory that makes `chunks` more chunks from noise of its own, and ends."""
    # The model is shared; a policy is a value. The last chunk of a take that ends needs no commit pass.
    twin = copy.deepcopy(take, {id(shared): shared for shared in (take.host, take.policy, take.compressor)})
    twin.noise = twin.sampler.noise([torch.Generator().manual_seed(seed)])
    twin.chunks = twin.index + chunks
    return twin


def held(take: Session) -> dict[str, int]:
    """Bytes that the take holds, by part (see `Session.memory`), with the weights of its compressor; on the device, and
    in all: the archive in host memory too."""
    parts = {name: size for name, size in take.memory().items() if name != "total"}
    if isinstance(take.compressor, torch.nn.Module):
        parts["compressor_weights"] = sum(p.nbytes for p in take.compressor.parameters())
    total = sum(parts.values())
    return {**parts, "device": total - parts.get("archive", 0), "total": total}


def _session(arm: Arm, footage: Footage, setting: Setting) -> Session:
    chunks = setting.length(footage.host) // footage.host.config.chunk_frames
    take = Session(
        footage.host, policy=arm.policy, prompt=footage.scene.caption, seed=footage.seed, height=lanes.SIZE,
        width=lanes.SIZE, decode=False, chunks=chunks, compressor=arm.made_by(),
    )  # fmt: skip
    if take.decoder is not None:
        take.decoder = Projector(footage)
    return take


def _shown(arm: Arm, footage: Footage, setting: Setting) -> Tensor:
    """The latents that are committed: the true ones, or those of the scene with everybody disguised."""
    return footage.latents(setting.length(footage.host), disguised=arm.control == names.SHUFFLED)


def _without_model(control: str, footage: Footage, truth: Tensor, frame: int, length: int) -> np.ndarray:
    """What a control shows from latent frame `frame` on, for `length` latent frames: the autoencoder's own picture."""
    if control == names.TRUTH:
        return footage.pixels(frame, truth[:, :, frame : frame + length])
    chunk = footage.host.config.chunk_frames
    past = truth[:, :, max(0, frame - ahead(chunk) * chunk) : frame]
    recent = footage.pixels(frame - past.shape[2], past)
    frames = lanes.STRIDE * length
    piece = recent[-1:] if control == names.FROZEN else recent
    return np.concatenate([piece] * math.ceil(frames / len(piece)))[:frames]


def _judged(video: np.ndarray, scene: lanes.Scene, start: int, probe: Probe) -> list[dict[str, Any]]:
    rows = []
    for event in probe.events:
        verdict = readback.judge(video, scene, start, event)
        if verdict is None:
            continue
        lane, _ = event.of(scene)
        last = lane.visits[event.visit - 1]
        rows.append({
            "lane": event.lane, "visit": event.visit, "frame": probe.frame, "gap": event.gap,
            "age": probe.frame - last.end + 1,  # latent frames from the last sight to what is generated
            "repainted": lane.paint is not None and lane.paint < last.end,
            "in_sink": lane.visits[0].start < lanes.SINK,
            **{key: (round(value, 2) if math.isfinite(value) else None) if key == "distance" else value
               for key, value in asdict(verdict).items()},
        })  # fmt: skip
    return rows
