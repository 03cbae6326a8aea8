"""FlowCache, chunkwise reuse (arXiv 2602.10825, §3): every chunk decides for itself whether its step is computed.

A chunk sums up how far its feature moves from step to step; while the sum f stays below a threshold ε, steps reuse the
last computed result, and computing one resets the sum:

    L1rel(k) = mean|F(k) − F(k−1)| / mean|F(k−1)|;   reuse k  ⇔  f + g(L1rel(k)) < ε      (strict: equality computes)

F is the patch embedding of the noisy latents (MAGI-1), or the timestep projection (SkyReels-V2): that one holds nothing
of the video, so the schedule is known before the take. Published: g = identity (MAGI-1), a polynomial (SkyReels-V2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..errors import LongtakeError
from .base import CARRIES, METRICS, Decision, ReusePolicy, ReuseState, Turn, check_choice
from .metric import Change
from .presets import POLYNOMIALS, preset, rescaled

LASTS = ("chunk", "take", "none")


@dataclass(frozen=True)
class Thresholded(ReusePolicy):
    """What FlowCache and TeaCache share: a metric, its rescaling, a threshold, and steps that are always computed."""

    threshold: float | str = "slow"  # or "fast": by the model's preset; 0 computes everything
    metric: str | None = None  # "latent" or "timestep"; None: the preset's, as all that follows
    carry: str = "velocity"  # or "update", "residual"
    warmup: int | None = None  # first steps that are always computed
    last: str | None = None  # which last step is always computed: every "chunk"'s, the whole "take"'s, or "none"
    rescale: str | None = None  # g: a name in POLYNOMIALS
    clamp: bool = True  # g is never negative (the published code lets it be)

    bare: ClassVar[str | None] = "threshold"

    def __post_init__(self) -> None:
        named = isinstance(self.threshold, str)
        if named:
            check_choice("threshold", self.threshold, ("slow", "fast"))
        elif not (math.isfinite(self.threshold) and self.threshold >= 0):  # type: ignore[operator, arg-type]
            raise LongtakeError(f"threshold {self.threshold}: give a number ≥ 0, or slow or fast")
        if self.warmup is not None and self.warmup < 0:
            raise LongtakeError(f"warmup {self.warmup}: give a number of steps ≥ 0")
        check_choice("carry", self.carry, CARRIES)
        check_choice("metric", self.metric or METRICS[0], METRICS)
        check_choice("last", self.last or LASTS[0], LASTS)
        check_choice("rescale", self.rescale or "identity", tuple(POLYNOMIALS))

    def measure(self) -> str | None:
        return self.metric

    def carries(self) -> str:
        return self.carry

    def for_model(self, preset_name: str) -> Self:
        open_fields = (self.metric, self.warmup, self.last, self.rescale)
        if None not in open_fields and not isinstance(self.threshold, str):
            return self
        of = preset(preset_name)
        named = isinstance(self.threshold, str)
        return replace(
            self,
            threshold=of.threshold(self.threshold, self._joint()) if named else self.threshold,  # type: ignore[arg-type]
            metric=self.metric or of.metric,
            warmup=of.warmup if self.warmup is None else self.warmup,
            last=self.last or of.last,
            rescale=self.rescale or of.rescale,
        )

    def _joint(self) -> bool:
        return False

    def _forced(self, done: int, turn: Turn) -> str | None:
        """Why a step is computed whatever moved, if so; `done` steps are behind."""
        assert self.warmup is not None
        if done < self.warmup:
            return "warm-up"
        if (self.last == "chunk" and turn.index == turn.steps - 1) or (self.last != "none" and turn.last):
            return "last"
        return None

    def _path(self, accumulator: float, change: Change) -> tuple[float, bool]:
        """The sum with this change, and whether it stays below the threshold."""
        assert self.rescale is not None
        assert not isinstance(self.threshold, str)
        path = accumulator + rescaled(change.relative, self.rescale, self.clamp)
        return path, self.threshold > 0 and path < self.threshold


@dataclass(frozen=True)
class FlowCacheReuse(Thresholded):
    """Every chunk in flight decides for itself, by how far it has moved since its last computed step."""

    name: ClassVar[str] = "flowcache"
    depends: ClassVar[str] = "chunk"

    def one(self, turn: Turn, state: ReuseState, change: Change | None) -> Decision:
        relative = None if change is None else change.relative
        reason = "first" if change is None else self._forced(turn.index, turn)
        reused, path = False, 0.0
        if reason is None:
            assert change is not None
            path, reused = self._path(state.accumulator, change)
            reason = "still" if reused else "moved"
        state.accumulator = path if reused else 0.0
        return Decision(turn.chunk, turn.index, turn.timestep, relative, state.accumulator, reused, reason)
