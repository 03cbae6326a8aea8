"""The contract of a sampler: how the chunk in flight comes about, and what its commit pass is fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..geometry import Geometry
from ..hosts.base import Host

if TYPE_CHECKING:
    from .chunked import Schedule


@dataclass(frozen=True)
class Sampling:
    """One chunk to be sampled.

    `forward(x, t, step)` is one forward, guidance included; `predicted(x0, t, step)` sees a step's prediction of the
    finished chunk and says what to go on with.
    """

    host: Host
    geometry: Geometry
    batch: int
    schedule: Schedule
    chunk: int  # chunks generated before this one
    noise: Any  # what `Sampler.noise` made, or the user's
    forward: Callable[[Tensor, float, int], Tensor]
    predicted: Callable[[Tensor, float, int], Tensor] = lambda x0, t, step: x0


class Sampler(ABC):
    """From nothing to a finished chunk. Keeps no state between chunks."""

    schedule: Schedule  # of a chunk's steps, the commit pass apart

    commits_last: ClassVar[bool] = True  # whether the last chunk of a take of known length is committed too
    reuses: ClassVar[bool] = True  # whether its forwards make velocities, which reuse policies carry over

    @abstractmethod
    def noise(self, generators: Sequence[torch.Generator]) -> Any:
        """The source of randomness of a take; one generator per take in lockstep, so each equals the same take run
        alone."""

    @abstractmethod
    def sample(self, chunk: Sampling) -> Tensor:
        """The finished chunk x0 [B, C, f, h, w]."""

    @abstractmethod
    def commit_input(self, x0: Tensor, geometry: Geometry, stream: str, given: bool = False) -> tuple[Tensor, float]:
        """What the commit pass of a guidance stream is fed: the chunk as later ones shall see it, and its timestep.
        `given`: it is not generated but the user's first image."""

    @abstractmethod
    def sound(self, x0: Tensor) -> Tensor:
        """Whether a chunk may be handed out, a boolean tensor of one element."""
