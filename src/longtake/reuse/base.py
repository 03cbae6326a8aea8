"""The contract of a reuse policy: which (chunk, step) forwards are computed, and which reuse an earlier result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor


@dataclass
class ReuseState:
    """What is remembered of one stream of one live block: owned by the session, new for every block."""

    feature: Tensor | None = None  # the metric's feature at the previous step
    accumulator: float = 0.0
    computed: int = 0  # forwards computed so far
    carry: Tensor | None = None  # the last computed velocity, as fresh input for the step that reuses it
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReusePolicy:
    """Decides, before each forward of a denoising step, whether to compute it. Pure but for the state it is handed."""

    name: ClassVar[str] = ""

    def compute(self, state: ReuseState, latents: Tensor, timestep: float, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` must be computed; `latents` [B, C, f, h, w] is the noisy chunk."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoReuse(ReusePolicy):
    """Compute every forward."""

    name: ClassVar[str] = "none"

    def compute(self, state: ReuseState, latents: Tensor, timestep: float, step: int, steps: int) -> bool:
        return True
