"""A take being made: chunks into their files, and what it took."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteError
from . import shell
from .latents import LatentsWriter
from .progress import TakeProgress

if TYPE_CHECKING:
    from torch import Tensor

    from ..reuse import Decision
    from ..session import Session
    from ..video import Mp4Writer

_PARTS = {"store": "history", "view": "view", "decoder": "decoder", "text": "text", "reuse": "reuse"}


@dataclass
class Made:
    """What came of a take."""

    frames: int = 0
    chunks: int = 0
    seconds: float = 0.0  # wall clock, from the first request to the last frame handed to the encoder
    status: str = "complete"  # or "interrupted", "non-finite"
    whole: bool = True  # the session stands at a chunk border, and the file holds everything up to it
    error: NonFiniteError | None = None
    prompt: str | None = None  # the last that was switched to
    decisions: list[Decision] = field(default_factory=list)  # of the reuse policy

    def figures(self, take: Session) -> dict[str, Any]:
        """Length, speed and bytes, all measured."""
        last, memory = take.stats.last, take.memory()
        video = self.frames / take.geometry.fps
        device = None
        if take.host.device.type == "cuda":
            import torch

            device = torch.cuda.max_memory_allocated(take.host.device)
        return {
            "chunks": self.chunks, "frames": self.frames, "video_seconds": video, "wall_seconds": self.seconds,
            "chunks_per_second": self.chunks / self.seconds if self.chunks else 0.0,
            "realtime_factor": video / self.seconds if self.chunks else 0.0,
            "forwards": take.stats.forwards, "reused": take.stats.reused,
            "attended_tokens": last.attended_tokens if last else 0,
            "history_used_bytes": last.history_bytes if last else 0,
            "last_chunk_flops": (last.flops.total or None) if last else None, "slots": slots(take),
            "memory": memory, "peak_rss_bytes": shell.peak_rss(), "peak_device_bytes": device,
        }  # fmt: skip


def slots(take: Session) -> list[dict[str, int]] | None:
    """Of a policy that thins frames at slots: which latent frames are held, oldest first, and how many tokens of each;
    None for other policies."""
    from ..plan import FULL, intersect
    from ..policies.slots import SlotPolicy

    if not isinstance(take.policy, SlotPolicy):
        return None
    return [
        {"frame": frame, "tokens": len(intersect(block.of_frames(frame, frame + 1), block.forms[FULL].owned))}
        for block in take.history.table().blocks
        for frame in range(block.frame, block.end)
    ]


def say_prompt(take: Session, prompt: str, embeds: dict[str, Tensor]) -> None:
    """The take's prompt from the next chunk on; `embeds` holds the prompts that are encoded already, [1, T, d]."""
    if prompt in embeds:
        take.set_prompt_embeds(embeds[prompt])
    else:
        take.prompt = prompt


def roll(
    take: Session, chunks: int, switches: list[tuple[float, str]], embeds: dict[str, Tensor], output: Path,
    latents: Path | None, stop: shell.StopAsked,
) -> Made:  # fmt: skip
    """Run the take into its files, obeying (second, prompt) switches. Chunks that are finished stay in the file
    whatever ends it: a signal, or a chunk that is not finite."""
    from ..video import Mp4Writer

    geometry, made = take.geometry, Made()
    with contextlib.ExitStack() as files:
        files.enter_context(contextlib.suppress(KeyboardInterrupt))  # outermost: the writers finish their files first
        made.status, made.whole = "interrupted", False
        video = files.enter_context(Mp4Writer(output, geometry.fps, geometry.height, geometry.width))
        labels = {"prompt": str(take.prompt), "model": take.host.name}
        rows = files.enter_context(LatentsWriter(latents, labels)) if latents else None
        progress = files.enter_context(TakeProgress(chunks, geometry.fps, output.name))
        try:
            _write_chunks(take, chunks, list(switches), embeds, stop, progress, video, rows, made)
            made.status = "interrupted" if stop.asked and made.chunks < chunks else "complete"
        except NonFiniteError as error:
            made.error, made.status = error, "non-finite"
        made.whole = True
        if not made.frames:
            video.discard()
    made.frames = video.frames
    return made


def _write_chunks(
    take: Session, chunks: int, switches: list[tuple[float, str]], embeds: dict[str, Tensor], stop: shell.StopAsked,
    progress: TakeProgress, video: Mp4Writer, rows: LatentsWriter | None, made: Made,
) -> None:  # fmt: skip
    while made.chunks < chunks and not stop.asked:
        while switches and switches[0][0] <= made.frames / take.geometry.fps:
            made.prompt = switches.pop(0)[1]
            say_prompt(take, made.prompt, embeds)
        chunk = next(take)
        assert chunk.frames is not None
        video.write(chunk.frames)
        if rows is not None:
            rows.write(chunk.latents)
        made.decisions += chunk.stats.decisions
        made.frames += len(chunk.frames)
        made.chunks += 1
        progress.step(len(chunk.frames), take.memory()["total"])
        made.seconds = progress.seconds


def report_text(report: dict[str, Any]) -> str:
    """The report for people."""
    if not report["frames"]:
        return "stopped before the first chunk: nothing was written"
    memory = report["memory"]
    held = ", ".join(f"{shell.bytes_text(memory[part])} {name}" for part, name in _PARTS.items() if memory.get(part))
    peaks = [(report["peak_rss_bytes"], "peak RSS"), (report["peak_device_bytes"], "peak on the device")]
    stopped = {"complete": "", "interrupted": "stopped; ", "non-finite": "broken off; "}[report["status"]]
    budget = report["fitted_to_bytes"]
    fitted = "" if budget is None else f", fitted to {shell.bytes_text(budget)}"
    lines = [
        f"{stopped}{report['output']}: {report['frames']} frames, {report['video_seconds']:.2f} s of video, "
        f"{report['width']}x{report['height']} at {report['fps']:g} fps",
        f"made in {report['wall_seconds']:.2f} s: {report['chunks']} chunks, "
        f"{report['chunks_per_second']:.2f} chunks/s, {report['realtime_factor']:.2f}x realtime; "
        f"model loaded in {report['load_seconds']:.1f} s",
        f"policy {report['policy']}{fitted}; the last chunk attended to {report['attended_tokens']} tokens",
        f"held: {held}" + "".join(f"; {name} {shell.bytes_text(count)}" for count, name in peaks if count),
    ]
    lines += [f"{what} {report[what]}" for what in ("latents", "snapshot") if report[what]]
    return "\n".join(lines)
