"""What a session hands out: a finished chunk, and what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from .flops import Flops

if TYPE_CHECKING:
    from .reuse import Decision


@dataclass
class ChunkStats:
    """What one chunk cost. Seconds are wall clock; on a GPU they are exact because frames are copied to the host."""

    index: int
    frame: int  # first latent frame
    latent_frames: int
    pixel_frames: int
    seconds: float  # everything from request to frames
    forward_seconds: float  # denoising and commit forwards (on a GPU: until enqueued)
    decode_seconds: float
    attended_tokens: int  # history in view plus the chunk itself
    history_bytes: int  # K/V rows in use
    forwards: int  # computed, the commit pass included
    reused: int
    compress_seconds: float = 0.0  # making the chunk's compressed form and its K/V
    decisions: tuple[Decision, ...] = ()  # of the reuse policy, step by step
    flops: Flops = field(default_factory=Flops)  # of the forwards that were computed; zeros where the host cannot tell
    skipped_flops: Flops = field(default_factory=Flops)  # of those that were reused instead

    @property
    def overhead_seconds(self) -> float:
        """Plan, view, bookkeeping: what is neither the model's forwards, decoding nor compressing."""
        return self.seconds - self.forward_seconds - self.decode_seconds - self.compress_seconds


@dataclass
class Chunk:
    """A finished chunk. With a list of prompts, `frames` and `latents` carry the takes on their first axis."""

    index: int
    frames: Tensor | None  # uint8 [T, H, W, 3], or [B, T, H, W, 3]; None when the session does not decode
    latents: Tensor  # fp32 [C, f, h, w], or [B, C, f, h, w]
    stats: ChunkStats


@dataclass
class SessionStats:
    """Totals so far."""

    chunks: int = 0
    pixel_frames: int = 0
    seconds: float = 0.0
    forwards: int = 0
    reused: int = 0
    last: ChunkStats | None = None

    def add(self, chunk: ChunkStats) -> None:
        self.chunks += 1
        self.pixel_frames += chunk.pixel_frames
        self.seconds += chunk.seconds
        self.forwards += chunk.forwards
        self.reused += chunk.reused
        self.last = chunk


class Clock:
    """Seconds spent in forwards, and how many there were."""

    def __init__(self) -> None:
        self.seconds, self.forwards, self.reused = 0.0, 0, 0
        self.flops, self.skipped, self._flops = Flops(), Flops(), Flops()

    def reuse(self, passes: int, cost: Flops, run: Flops) -> None:
        """A step whose `passes` are reused: they would have taken `cost`, and `run` of it is done all the same."""
        self.reused += passes
        self.flops, self.skipped = self.flops + run, self.skipped + (cost - run)

    def of(self, flops: Flops) -> Clock:
        """`with clock.of(flops):` a forward that takes so many."""
        self._flops = flops
        return self

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds += time.perf_counter() - self._started
        self.forwards += 1
        self.flops, self._flops = self.flops + self._flops, Flops()
