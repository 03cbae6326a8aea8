"""One take of a batch, made into a folder: its video, and a record of where it came from."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..digest import file_sha256
from ..errors import LongtakeError, NonFiniteError
from .jobs import Job

VIDEO, RECORD, TOKEN = "take.mp4", "take.json", "token"
_FORMAT = 1  # version of the record


class Stopped(Exception):
    """The take was given up between two chunks, because somebody asked for the end."""


class Maker:
    """Makes takes, one at a time. The model of the last one stays loaded. In a Ray cluster this is the actor."""

    def __init__(self, device: str | None = None, dtype: str | None = None, threads: int | None = None) -> None:
        self.device, self.dtype, self.threads = device, dtype, threads
        self._loaded: tuple[str, Any] | None = None
        self._origin: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Where it runs."""
        from .. import __version__

        return {"host": socket.gethostname(), "pid": os.getpid(), "longtake": __version__}

    def make(self, job: Job, folder: Path, go_on: Callable[[], bool] = lambda: True) -> dict[str, Any]:
        """Write VIDEO and RECORD into `folder`, and return the record. Raises LongtakeError for what this model cannot
        make, NonFiniteError for a chunk that is not finite, and Stopped if `go_on` says no."""
        from ..evaluate.machine import threads_for

        started = time.perf_counter()
        host = self._host(job.model)
        with threads_for(host, self.threads):
            return self._make(host, job, folder, go_on, started)

    def answer(self, job: Job, folder: Path, token: str, base: Path) -> dict[str, Any]:
        """`make` for a driver that may share no disk with this machine: what is in the token's file beside `folder`
        tells. `base` is what relative paths start from. Returns {"record", "video"}, with the video's bytes where it
        could not be put into the folder; or {"problem"}."""
        try:
            if base.is_dir():
                os.chdir(base)
            if _shared(folder, token):
                return {"record": self.make(job, folder), "video": None}
            with tempfile.TemporaryDirectory(prefix="longtake-") as own:
                record = self.make(job, Path(own))
                return {"record": record, "video": (Path(own) / VIDEO).read_bytes()}
        except Exception as error:  # said, not raised: it has to come through the network whole
            return {"problem": problem_of(error)}

    def _make(
        self, host: Any, job: Job, folder: Path, go_on: Callable[[], bool], started: float
    ) -> dict[str, Any]:  # fmt: skip
        from ..named import spec
        from ..policies import parse
        from ..reuse import parse as parse_reuse
        from ..session import Session
        from ..video import Mp4Writer

        height, width = job.height_width
        geometry = host.geometry(height, width)
        chunks = job.chunks
        if chunks is None:
            chunks = geometry.chunks(job.seconds or 0, given=0 if job.image is None else 1)
        total = geometry.pixel_frames(chunks * geometry.chunk_frames)
        last = (total - geometry.chunk_frames * geometry.stride[0]) / geometry.fps
        if job.switch and job.switch[-1][0] > last:
            raise LongtakeError(f"switch at {job.switch[-1][0]:g} s: the take's last chunk begins at {last:.2f} s")
        take = Session(
            host, None if job.policy is None else parse(job.policy), reuse=parse_reuse(job.reuse), prompt=job.prompt,
            negative_prompt=job.negative, seed=job.seed, height=height, width=width, num_inference_steps=job.steps,
            guidance_scale=job.guidance, image=_first_frame(job.image, geometry), prompt_switch=job.switch_mode,
            chunks=chunks,
        )  # fmt: skip
        latents, frames, switches, began = hashlib.sha256(), 0, list(job.switch), time.perf_counter()
        with Mp4Writer(folder / VIDEO, geometry.fps, geometry.height, geometry.width) as video:
            while True:
                while switches and switches[0][0] <= frames / geometry.fps:
                    take.prompt = switches.pop(0)[1]
                if (chunk := next(take, None)) is None:
                    break
                if not go_on():
                    raise Stopped
                latents.update(chunk.latents.float().cpu().contiguous().numpy().tobytes())
                assert chunk.frames is not None
                video.write(chunk.frames)
                frames += len(chunk.frames)
        record = {
            "format": _FORMAT, "job": asdict(job), "digest": job.digest, "model": host.name,
            "policy": spec(take.policy), "reuse": spec(take.reuse), "seed": job.seed, "chunks": take.index,
            "frames": frames, "video_seconds": frames / geometry.fps, "fps": geometry.fps, "width": geometry.width,
            "height": geometry.height, "device": str(host.device), "dtype": str(host.dtype).removeprefix("torch."),
            "seconds": time.perf_counter() - began, "seconds_with_loading": time.perf_counter() - started,
            "forwards": take.stats.forwards, "reused": take.stats.reused, "memory": take.memory(),
            "video_bytes": (folder / VIDEO).stat().st_size, "video_sha256": file_sha256(folder / VIDEO),
            "latents_sha256": latents.hexdigest(), "worker": self.identity(), **self._provenance(host),
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False))
        return record

    def _host(self, name: str) -> Any:
        from ..hosts.loading import load

        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # first: two models may not fit
            host = load(name, device=self.device, dtype=self.dtype)
            for part in ("vae", "text_encoder"):
                if getattr(host, part, host) is None:
                    raise LongtakeError(f"{name} has no {part}/: name a complete folder")
            self._loaded = name, host
        return self._loaded[1]

    def _provenance(self, host: Any) -> dict[str, Any]:
        from ..evaluate.provenance import provenance

        if self._origin is None:
            self._origin = provenance(host.device)
        return self._origin | {"date": datetime.now(UTC).isoformat(timespec="seconds")}


def problem_of(error: BaseException) -> str:
    """Why a take failed, on one line; a defect with its type."""
    words = " ".join(str(error).split()) or "no reason was given"
    return words if isinstance(error, LongtakeError | NonFiniteError) else f"{type(error).__name__}: {words}"


def _shared(folder: Path, token: str) -> bool:
    """Whether this machine sees the driver's folder under the same path."""
    try:
        return (folder.parent / TOKEN).read_text() == token and os.access(folder, os.W_OK)
    except OSError:
        return False


def _first_frame(path: str | None, geometry: Any) -> Any:
    import torch

    from ..video import read_image

    if path is None:
        return None
    rgb = read_image(path, (geometry.height, geometry.width))
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1
