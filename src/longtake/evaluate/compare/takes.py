"""Free takes: a prompt, a seed, a policy, a kind of reuse, and everything that was made and measured of it, in files.

A take's files, all in the folder of its cell:

    take.mp4             every frame
    latents.safetensors  `latents`, fp32 [F, C, h, w], latent frame first
    chunks.json          what every chunk cost, and what was decided about reuse, step by step
    sight.json           which blocks every chunk was shown, in which form, at which place
    frames.json          measures over time
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ...chunk import Chunk
from ...history.sight import BlockSight, Sight
from ...hosts.base import Host
from ...session import Session
from ...video import Mp4Writer
from ...zoo import lanes, readback
from ..metrics import Meter
from .arms import Arm
from .files import CHUNKS, FRAMES, LATENTS, SIGHT, VIDEO
from .protocols import held
from .writing import writing

MOST, OLDEST = 512, 16  # blocks told of a chunk's sight; of more, the oldest few and the newest


@dataclass(frozen=True)
class TakeSetting:
    """One prompt at one length and size; `steps` and `guidance` None: the model's own."""

    prompt: str
    chunks: int
    height: int  # pixels
    width: int
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    protocol: str = "takes"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_take(arm: Arm, host: Host, setting: TakeSetting, seed: int, folder: Path) -> dict[str, Any]:
    """Make a take and its files in `folder`; its outcome, as JSON values. Raises StoreError if the disk is full, and
    what a session raises where policy, reuse and model do not go together."""
    take = Session(
        host, arm.policy, reuse=arm.reuse, prompt=setting.prompt, negative_prompt=setting.negative or None, seed=seed,
        height=setting.height, width=setting.width, num_inference_steps=setting.steps,
        guidance_scale=setting.guidance, chunks=setting.chunks,
    )  # fmt: skip
    record = _Record(take)
    geometry = take.geometry
    with writing():
        video = Mp4Writer(folder / VIDEO, geometry.fps, geometry.height, geometry.width)
    try:
        for chunk in take:
            frames = record.add(chunk)
            with writing():
                video.write(frames)
        with writing():
            video.close()
            record.write(folder)
    finally:
        video.discard()  # does nothing to a closed one
    return record.outcome()


class _Record:
    """Notes everything about a take while it is made."""

    def __init__(self, take: Session) -> None:
        self.take = take
        self.sight = Sight(take.history)
        size = take.geometry.height, take.geometry.width
        world = take.host.config.world == lanes.WORLD and size == (lanes.SIZE, lanes.SIZE)
        self.meter = Meter(take.geometry.fps, readback.clock if world else None, lanes.TURN)
        self.latents: list[torch.Tensor] = []  # [f, C, h, w]
        self.chunks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.frames = 0

    def add(self, chunk: Chunk) -> np.ndarray:
        """The chunk's frames, uint8 [T, H, W, 3], once everything about it is noted."""
        assert chunk.frames is not None
        frames = chunk.frames.numpy()
        stats = chunk.stats
        self.chunks.append({
            "index": stats.index, "frame": stats.frame, "latent_frames": stats.latent_frames,
            "pixel_frame": self.frames, "pixel_frames": stats.pixel_frames,
            **{name: round(getattr(stats, name), 6) for name in (
                "seconds", "forward_seconds", "decode_seconds", "compress_seconds", "overhead_seconds"
            )},
            "attended_tokens": stats.attended_tokens, "history_bytes": stats.history_bytes,
            "memory": held(self.take), "forwards": stats.forwards, "reused": stats.reused,
            "flops": stats.flops.as_dict(), "skipped_flops": stats.skipped_flops.as_dict(),
            "decisions": [_finite(asdict(decision)) for decision in stats.decisions],
        })  # fmt: skip
        self.rows.append(sight_row(self.sight, chunk))
        self.latents.append(chunk.latents.float().cpu().transpose(0, 1))
        self.meter.add(frames)
        self.frames += len(frames)
        return frames

    def write(self, folder: Path) -> None:
        """Every file but the video."""
        save_file({"latents": torch.cat(self.latents).contiguous()}, folder / LATENTS)
        columns = {"at": "temporal position of the first frame, in latent frames", "share": "of layers × heads"}
        for name, content in (
            (CHUNKS, self.chunks), (SIGHT, {"columns": columns, "chunks": self.rows}), (FRAMES, self.meter.frames()),
        ):  # fmt: skip
            (folder / name).write_text(json.dumps(content, allow_nan=False, separators=(",", ":")), encoding="utf-8")

    def outcome(self) -> dict[str, Any]:
        chunks, geometry = self.chunks, self.take.geometry
        seconds = [chunk["seconds"] for chunk in chunks]
        memory = {name for chunk in chunks for name in chunk["memory"]}
        total = lambda name: sum(chunk[name] for chunk in chunks)
        return {
            "chunks": len(chunks), "frames": self.frames, "fps": geometry.fps, "height": geometry.height,
            "width": geometry.width, "latent_frames": total("latent_frames"), "status": "complete",
            "seconds": round(sum(seconds), 4), "realtime": round(self.frames / geometry.fps / sum(seconds), 4),
            "chunk_seconds": {
                "median": round(float(np.median(seconds)), 5), "first": round(seconds[0], 5),
                "last": round(seconds[-1], 5),
            },
            "forwards": total("forwards"), "reused": total("reused"),
            "flops": sum(chunk["flops"]["total"] for chunk in chunks),
            "skipped_flops": sum(chunk["skipped_flops"]["total"] for chunk in chunks),
            "attended_tokens": max(chunk["attended_tokens"] for chunk in chunks),
            "attended_total": total("attended_tokens"), "token_bytes": self.take.history.shape.token_bytes,
            "bytes": {name: max(chunk["memory"].get(name, 0) for chunk in chunks) for name in sorted(memory)},
            "metrics": self.meter.summary(),
        }  # fmt: skip


def sight_row(sight: Sight, chunk: Chunk) -> dict[str, Any]:
    """What a chunk was shown, as JSON values: see the module's first lines, and `history.sight`."""
    past = sight.past()
    if len(past) > MOST:
        past = past[:OLDEST] + past[OLDEST - MOST :]
    live = sight.live
    frame = min((block.frame for block in live), default=chunk.stats.frame)
    return {
        "index": chunk.stats.index, "frame": chunk.stats.frame, "span": sum(block.span for block in live),
        "at": frame + sight.live_shift, "tokens": sum(block.forms["full"].tokens for block in live),
        "blocks": [_block(each) for each in past],
    }  # fmt: skip


def _block(each: BlockSight) -> dict[str, Any]:
    block = each.block
    told: dict[str, Any] = {
        "id": block.id, "frame": block.frame, "span": block.span, "role": block.role,
        "tokens": max(form.tokens for form in block.forms.values()),
        "held": {name: form.count for name, form in block.forms.items()},
    }  # fmt: skip
    if each.away:
        told["away"] = True
    told["seen"] = [
        {
            "form": seen.form, "tokens": seen.tokens, "at": round(seen.at, 3), "share": round(seen.share, 4),
            **({"log_weight": round(seen.log_weight, 4)} if seen.log_weight else {}),
        }
        for seen in each.seen
    ]  # fmt: skip
    return told


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def replayed(host: Host, folder: Path) -> Iterator[np.ndarray]:
    """The frames of a kept take, uint8 [T, H, W, 3] chunk by chunk, decoded anew from its latents: exactly those that
    were made, which the MP4 holds only nearly."""
    latents = load_file(folder / LATENTS)["latents"].transpose(0, 1)[None]  # [1, C, F, h, w]
    latents = (latents.long() if host.codes else latents).to(host.device)
    decoder = host.decoder()
    lengths = [chunk["latent_frames"] for chunk in json.loads((folder / CHUNKS).read_text(encoding="utf-8"))]
    for part in latents.split(lengths, 2):
        with torch.no_grad(), host.lock:
            frames = decoder.push(part)[0].cpu().numpy()
        yield frames  # outside: whoever iterates has gradients, and the model, as before
