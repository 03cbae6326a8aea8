"""How one chunk goes from one noise level to the next. Every chunk in flight owns a solver: chunks are at different
steps, and a multistep method remembers what it saw.

`levels` are the noise levels a chunk passes through, one more than it takes steps. Velocity is dx/dlevel, so σ (1 to 0,
Wan) and t (0 to 1, MAGI-1) are both levels, and the last level is the finished chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor


class Solver(Protocol):
    """Steps of one chunk, in order. Latents and velocities are fp32 [B, C, f, h, w]."""

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        """The latents at the next level."""

    def skip(self) -> None:
        """The chunk went to the next level without a velocity. What earlier steps left no longer fits its way."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None: ...


class Euler:
    """x + (level_{k+1} − level_k)·velocity."""

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels, self.index = tuple(levels), 0

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        delta = self.levels[self.index + 1] - self.levels[self.index]
        self.index += 1
        return x + delta * velocity

    def skip(self) -> None:
        self.index += 1

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"index": self.index}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.index = int(meta["index"])


class Renoise:
    """Predict x0, then add fresh noise at the next level: the few-step models' own way (see `chunked.denoise`)."""

    def __init__(self, levels: Sequence[float], fresh: Callable[[Tensor], Tensor]) -> None:
        self.levels, self.index, self.fresh = tuple(levels), 0, fresh

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        x0 = (x.double() - self.levels[self.index] * velocity.double()).float()
        self.index += 1
        level = self.levels[self.index]
        return x0 if level == 0 else (1 - level) * x0 + level * self.fresh(x0).to(x0)

    def skip(self) -> None:
        self.index += 1

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"index": self.index}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.index = int(meta["index"])
