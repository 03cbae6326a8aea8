"""The chunked few-step sampler of Self-Forcing and its descendants: predict x0, renoise, repeat; then a clean pass.

    for step s:  v = model(x, t_s);  x0 = x − σ_s·v;  x = (1 − σ_{s+1})·x0 + σ_{s+1}·fresh noise

Timesteps are fractional: rounding 937.5 to an integer already changes the frames visibly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..geometry import Geometry
from .base import Sampler, Sampling

CLEAN_TIMESTEP = 0.0  # of the commit pass


@dataclass(frozen=True)
class Schedule:
    """Timesteps in 0 … 1000 and their noise levels σ = t / 1000, noisiest first."""

    timesteps: tuple[float, ...]

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(t / 1000 for t in self.timesteps)

    @classmethod
    def shifted(cls, nominal: Sequence[float], shift: float) -> Schedule:
        """Nominal timesteps u·1000 moved towards noise: σ = s·u / (1 + (s − 1)·u) (Self-Forcing: s = 5)."""
        if (
            not nominal
            or any(not 0 < t <= 1000 for t in nominal)
            or list(nominal) != sorted(set(nominal), reverse=True)
        ):
            raise LongtakeError(f"timesteps {list(nominal)}: give falling values in (0, 1000]")
        u = [t / 1000 for t in nominal]
        return cls(tuple(1000 * shift * x / (1 + (shift - 1) * x) for x in u))

    @classmethod
    def of_steps(cls, steps: int, shift: float) -> Schedule:
        """`steps` nominal timesteps in equal distances from 1000 down."""
        if steps < 1:
            raise LongtakeError(f"{steps} steps: a chunk needs at least 1")
        return cls.shifted([1000 * (1 - i / steps) for i in range(steps)], shift)


def denoise(
    velocity: Callable[[Tensor, float, int], Tensor], x: Tensor, schedule: Schedule, fresh: Callable[[int], Tensor],
    predicted: Callable[[Tensor, float, int], Tensor] = lambda x0, t, step: x0,
) -> Tensor:  # fmt: skip
    """A chunk from noise x [B, C, f, h, w] to x0, in fp32.

    `velocity(x, t, step)` is one forward; `fresh(step)` the noise added after that step, shaped like x;
    `predicted(x0, t, step)` sees the step's prediction and says what to go on with.
    """
    sigmas = schedule.sigmas
    for step, (t, sigma) in enumerate(zip(schedule.timesteps, sigmas, strict=True)):
        x0 = predicted((x.double() - sigma * velocity(x, t, step).double()).float(), t, step)
        if step + 1 == len(sigmas):
            return x0
        x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * fresh(step).to(x0)
    raise AssertionError("a schedule has at least one step")


class NoiseSource:
    """Seeded noise of a take; one generator per take in lockstep, so each equals the same take run alone.

    Drawn on the CPU in the layout [frames, C, h, w] of the original rollouts, so seeds mean the same on every device.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)

    def draw(self, channels: int, frames: int, height: int, width: int) -> Tensor:
        """Standard normal noise [B, C, f, h, w]."""
        each = [torch.randn(frames, channels, height, width, generator=g, device=g.device) for g in self.generators]
        return torch.stack([x.cpu() for x in each]).transpose(1, 2)

    def state(self) -> list[Tensor]:
        return [g.get_state() for g in self.generators]

    def restore(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


@dataclass(frozen=True)
class ChunkedSampler(Sampler):
    """Noise in, x0 out, fresh noise after every step but the last; committed by a pass over the clean latents."""

    schedule: Schedule

    def noise(self, generators: Sequence[torch.Generator]) -> NoiseSource:
        return NoiseSource(generators)

    def sample(self, chunk: Sampling) -> Tensor:
        geometry, (height, width) = chunk.geometry, chunk.geometry.latent_size
        draw = lambda _: chunk.noise.draw(geometry.channels, geometry.chunk_frames, height, width).to(chunk.host.device)
        return denoise(chunk.forward, draw(0), chunk.schedule, draw, chunk.predicted)

    def commit_input(self, x0: Tensor, geometry: Geometry, stream: str, given: bool = False) -> tuple[Tensor, float]:
        return x0, CLEAN_TIMESTEP

    def sound(self, x0: Tensor) -> Tensor:
        return torch.isfinite(x0).all()
