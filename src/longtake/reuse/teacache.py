"""TeaCache (arXiv 2411.19108) on several chunks in flight: one accumulator for all of them together.

The baseline FlowCache is compared with. It decides once per row of the sampler: either every chunk is computed, or all
of them reuse their last result. A chunk that has just entered is always computed. Chunks are compared with *their own*
previous step, whatever window they stood in; every computed forward writes its K/V, and the host's commit rule stays as
it is. (A published port compares a sliding window slot by slot, so chunk j with chunk j − 1; leaves reused chunks
unmoved while the window grows; and never writes the K/V of the first chunk, whose rows are then read uninitialised.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import Decision, ReuseState, Turn
from .flowcache import Thresholded
from .metric import Change


@dataclass(frozen=True)
class TeaCacheReuse(Thresholded):
    """All chunks in flight are computed, or all reuse, by how far they have moved together."""

    name: ClassVar[str] = "teacache"
    depends: ClassVar[str] = "row"

    def _joint(self) -> bool:
        return True

    def decide(
        self, turns: Sequence[Turn], states: Sequence[ReuseState], changes: Sequence[Change | None], shared: ReuseState
    ) -> list[Decision]:
        """The warm-up counts rows of the take, as published; `last` is the take's unless it says "chunk"."""
        known = [change for change in changes if change is not None]
        joint = Change.joint(known) if known else None
        forced = next((why for turn in turns if (why := self._forced(shared.done, turn))), None)
        reused, path, why = False, 0.0, forced or "first"
        if forced is None and joint is not None:
            path, reused = self._path(shared.accumulator, joint)
            why = "still" if reused else "moved"
        shared.accumulator = path if reused else 0.0
        shared.done += 1
        relative = None if joint is None else joint.relative
        return [
            Decision(
                turn.chunk, turn.index, turn.timestep, relative, shared.accumulator, reused and change is not None,
                "entered" if reused and change is None else why,
            )
            for turn, change in zip(turns, changes, strict=True)
        ]  # fmt: skip
