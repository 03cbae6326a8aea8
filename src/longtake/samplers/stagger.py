"""The settings of a staggered take: steps, lag, windows, given frames, and how a finished chunk becomes the past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..geometry import Geometry
from ..hosts.base import HostConfig
from .base import Sampler, Sampling
from .chunked import NoiseSource, Schedule
from .step_matrix import StepMatrix

COMMITS = ("clean", "adopt")
COMPAT = ("fixed", "upstream")


@dataclass(frozen=True)
class Stagger(Sampler):
    """How a staggered take is laid out. It is run by a `Staggered`, which keeps the chunks in flight."""

    steps: int | None = None  # denoising steps per chunk; None: the model's
    lag: int = 5  # steps by which a chunk is behind the one before it; 0: all together (diffusers: `ar_step`)
    window: int | None = None  # latent frames of a window; None: one endless history
    overlap: int = 0  # latent frames of a window that repeat the end of the one before
    condition_noise: float = 0.0  # thousandths of noise in given frames, and their timestep (`addnoise_condition`)
    # How a finished chunk's K/V become the past: by a pass over the clean latents, or as its last step left them.
    commit: str = "clean"
    compat: str = "fixed"  # or "upstream": with the published pipelines' slip in UniPC (see `samplers.unipc`)

    def __post_init__(self) -> None:
        for name, known in (("commit", COMMITS), ("compat", COMPAT)):
            if getattr(self, name) not in known:
                raise LongtakeError(f"{name} {getattr(self, name)!r}: use one of {', '.join(known)}")
        if not 0 <= self.condition_noise < 1000:
            raise LongtakeError(f"condition_noise {self.condition_noise}: give thousandths, 0 to 999 (20 is usual)")
        if self.overlap < 0 or (self.window is not None and not self.overlap < self.window):
            raise LongtakeError(
                f"windows of {self.window} latent frames that overlap by {self.overlap}: let them overlap by less"
            )

    @classmethod
    def of(cls, config: HostConfig, steps: int | None = None) -> Stagger:
        """As the model has it, with `steps` instead of its own number of them."""
        windows = config.overlap is not None
        return cls(
            steps or config.steps, config.lag, config.training_frames if windows else None, config.overlap or 0,
            config.condition_noise, config.commit,
        )  # fmt: skip

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """Of a single chunk there is none: see `Host.timetable`."""
        return Schedule(())

    def noise(self, generators: Sequence[torch.Generator]) -> NoiseSource:
        return NoiseSource(generators)

    def sample(self, chunk: Sampling) -> Tensor:
        raise TypeError("a staggered take samples several chunks at once: Staggered runs it")

    def commit_input(self, x0: Tensor, geometry: Geometry, stream: str, given: bool = False) -> tuple[Tensor, float]:
        raise TypeError("a staggered take commits by itself: Staggered runs it")

    def sound(self, x0: Tensor) -> Tensor:
        return torch.isfinite(x0).all()

    def check(self, geometry: Geometry, frames: int, steps: int) -> None:
        """Raise LongtakeError if more chunks would be in flight than a model of so many latent frames sees."""
        matrix, live, _ = self.layout(geometry, steps, None)
        matrix.check(live, frames // geometry.chunk_frames)

    def layout(self, geometry: Geometry, steps: int, ends_at: int | None) -> tuple[StepMatrix, int, int | None]:
        """The step matrix, the most chunks in flight, and the most latent frames that one history ever holds."""
        matrix = StepMatrix(steps, self.lag)
        lengths = [n for n in (self.window, ends_at) if n is not None]
        frames = min(lengths) if lengths else None
        chunks = None if frames is None else -(-frames // geometry.chunk_frames)
        return matrix, matrix.in_flight(chunks), frames
