"""The protocols. A: true frames are committed under the policy, then two chunks are generated from noise that is the
same for all policies, at every probe. B: a short true beginning, then a free run far beyond the training length."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hosts.base import Host
from ...policies import KVPolicy
from ...samplers.chunked import NoiseSource
from ...session import Session
from ...zoo import lanes, readback
from . import arms as arm_names
from .arms import Arm
from .footage import Probe, pixels_of, probes, scene_of, true_latents
from .picture import off_actor_ssim, psnr, slopes

CHUNKS = 2  # generated at every probe


@dataclass(frozen=True)
class Setting:
    """What every cell of a run shares: true latent frames at most, gaps of the scenes, frames of a free run."""

    protocol: str = "A"
    frames: int = 120
    gaps: tuple[int, ...] = lanes.GAPS
    free: int = 504

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(host: Host, arm: Arm, seed: int, setting: Setting, cache: Path | None = None) -> dict[str, Any]:
    """One cell, as JSON values: `events` and the cost figures of protocol A, or the course of protocol B."""
    return (
        _teacher_forced(host, arm, seed, setting, cache)
        if setting.protocol == "A"
        else _free(host, arm, seed, setting, cache)
    )


def _teacher_forced(host: Host, arm: Arm, seed: int, setting: Setting, cache: Path | None) -> dict[str, Any]:
    geometry = host.geometry(lanes.SIZE, lanes.SIZE)
    chunk = geometry.chunk_frames
    scene = scene_of(seed, setting.frames, setting.gaps)
    places = probes(scene, setting.frames, chunk)
    frames = setting.frames + CHUNKS * chunk
    truth = true_latents(host, scene, frames, cache and cache / f"{seed}.safetensors")
    shown = truth
    if arm.control == arm_names.SHUFFLED:
        other = cache and cache / f"{seed}-disguised.safetensors"
        shown = true_latents(host, scene.disguised(seed), frames, other)
    take = None if arm.control in arm_names.MODEL_FREE else _session(host, arm.policy, scene.caption, seed)
    cell: dict[str, Any] = {"events": [], "psnr": [], "attended_tokens": 0, "bytes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for probe in places:
            if take is None:
                made, before = _without_model(arm.control, truth, probe.frame, CHUNKS * chunk)
            else:
                while take.frame < probe.frame:
                    take.extend(shown[:, :, take.frame : take.frame + chunk])
                snapshot = Path(folder) / "probe.safetensors"
                take.snapshot(snapshot)
                take.noise = NoiseSource([torch.Generator().manual_seed(1000 * seed + probe.frame)])
                parts = []
                for _ in range(CHUNKS):
                    generated = next(take)
                    parts.append(generated.latents[None])
                    cell["attended_tokens"] = max(cell["attended_tokens"], generated.stats.attended_tokens)
                cell["bytes"] = _bytes(take)
                made, before = torch.cat(parts, 2), truth[:, :, : probe.frame]
                take = Session.restore(snapshot, host, arm.policy)
            video = pixels_of(host, before, made)
            start = lanes.STRIDE * (probe.frame - 1) + 1
            if arm.control == arm_names.FROZEN:
                last = pixels_of(host, truth[:, :, : probe.frame - 1], truth[:, :, probe.frame - 1 : probe.frame])
                video = np.repeat(last[-1:], len(video), 0)
            cell["events"] += _judged(video, scene, start, probe)
            cell["psnr"].append(psnr(video, scene.render(len(video), start)))
    return cell


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


def _without_model(control: str, truth: Tensor, frame: int, length: int) -> tuple[Tensor, Tensor]:
    """Latents that a control shows from `frame` on, and what goes before them."""
    if control == arm_names.LOOP:  # the last frames once more, and again if there are too few
        past = truth[:, :, max(0, frame - length) : frame]
        return past.repeat(1, 1, math.ceil(length / past.shape[2]), 1, 1)[:, :, :length], truth[:, :, :frame]
    return truth[:, :, frame : frame + length], truth[:, :, :frame]


def _session(host: Host, policy: KVPolicy | None, prompt: str, seed: int, chunks: int | None = None) -> Session:
    return Session(
        host, policy=policy, prompt=prompt, seed=seed, height=lanes.SIZE, width=lanes.SIZE, decode=False, chunks=chunks
    )


def _bytes(take: Session) -> dict[str, int]:
    """Bytes on the device, and all that is held, archive and compressor included."""
    parts = take.memory()
    away = sum(size for name, size in parts.items() if name in ("archive", "host_archive"))
    return {"device": parts["total"] - away, "total": parts["total"]}


def _free(host: Host, arm: Arm, seed: int, setting: Setting, cache: Path | None) -> dict[str, Any]:
    geometry = host.geometry(lanes.SIZE, lanes.SIZE)
    chunk = geometry.chunk_frames
    given = max(chunk, min(host.config.training_frames, setting.frames) // chunk * chunk)
    scene = scene_of(seed, given + setting.free, setting.gaps)
    truth = true_latents(host, scene, given, cache and cache / f"{seed}-free.safetensors")
    count = setting.free // chunk
    cell: dict[str, Any] = {"attended_tokens": 0, "bytes": {}}
    start = lanes.STRIDE * (given - 1) + 1
    if arm.control in arm_names.MODEL_FREE:
        if arm.control == arm_names.TRUTH:
            latents = true_latents(
                host, scene, given + count * chunk, cache and cache / f"{seed}-free-truth.safetensors"
            )
            video = pixels_of(host, latents[:, :, :given], latents[:, :, given:])
        else:
            recent = pixels_of(host, truth[:, :, : -2 * chunk], truth[:, :, -2 * chunk :])
            length = lanes.STRIDE * chunk * count
            piece = recent[-1:] if arm.control == arm_names.FROZEN else recent
            video = np.concatenate([piece] * math.ceil(length / len(piece)))[:length]
    else:
        shown = truth
        if arm.control == arm_names.SHUFFLED:
            shown = true_latents(host, scene.disguised(seed), given)
        take = _session(host, arm.policy, scene.caption, seed, chunks=(given // chunk) + count)
        while take.frame < given:
            take.extend(shown[:, :, take.frame : take.frame + chunk])
        decoder = host.decoder()
        decoder.push(truth[:, :, -4:])
        parts = []
        for generated in take:
            parts.append(decoder.push(generated.latents[None])[0].cpu().numpy())
            cell["attended_tokens"] = max(cell["attended_tokens"], generated.stats.attended_tokens)
        cell["bytes"] = _bytes(take)
        video = np.concatenate(parts)
    return cell | _course(video, scene, start, chunk)


def _course(video: np.ndarray, scene: lanes.Scene, start: int, chunk: int) -> dict[str, Any]:
    """What becomes of the actors that were seen, return by return, as the picture itself tells their comings."""
    begun = (start + lanes.STRIDE - 1) // lanes.STRIDE
    returns: list[dict[str, Any]] = []
    first_error = None
    for number, lane in enumerate(scene.lanes):
        if lane is None or not any(v.end >= 0 and v.start < begun - 1 for v in lane.visits):
            continue
        look = lane.looks(begun)
        reading = readback.read(video, scene, number)
        hidden, gap, visit = 0, None, []
        for t in range(len(video) + 1):
            here = t < len(video) and reading.count[t] > 0
            if here:
                if hidden >= lanes.STRIDE:
                    gap = round(hidden / lanes.STRIDE)
                hidden = 0
                visit.append(t)
                continue
            hidden += 1
            if visit and (hidden >= lanes.STRIDE or t == len(video)):
                known = [k for k in visit if reading.colour[k] >= 0]
                if gap is not None and len(known) >= lanes.STRIDE:
                    right = float(np.mean([reading.colour[k] == look.colour for k in known])) > 0.5
                    fits = float(np.mean([reading.texture[k] == look.texture for k in known])) > 0.5
                    twice = float(np.mean(reading.count[visit] > 1)) > 0.5
                    at = visit[0] // (lanes.STRIDE * chunk)
                    returns.append(
                        {"lane": number, "gap": gap, "chunk": at, "colour": right, "texture": fits, "duplicated": twice}
                    )
                    if not right and (first_error is None or at < first_error):
                        first_error = at
                visit, gap = [], None
    error = readback.clock(video)
    steps = (np.diff(error) + 0.5) % 1.0 - 0.5  # turns a frame; the law says 1 / TURN
    lawful = np.abs(steps * lanes.TURN - 1.0) < 1.0
    ssim = off_actor_ssim(video, scene, start)
    return {
        "returns": returns, "chunks": len(video) // (lanes.STRIDE * chunk), "first_error": first_error,
        "clock_lawful": round(float(lawful.mean()), 4), "background_ssim": ssim, **slopes(video),
    }  # fmt: skip
