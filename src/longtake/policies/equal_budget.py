"""What PackCache must beat with the same bytes: the same machinery, other shares.

`last-frames` spends the budget on the newest frames whole, `sink-window` keeps the take's first frames beside them, and
`uniform` keeps the same part of every retained frame. All move what they retain to slots, as PackCache does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from ..errors import LongtakeError
from ..plan import HistoryShape
from .selection import ORDERS, ranks
from .slots import Frame, SlotPolicy


@dataclass(frozen=True)
class LastFrames(SlotPolicy):
    """A sliding window of whole frames at slots, anchors apart: with one frame, the baseline of the PackCache paper."""

    frames: int = 1  # newest history frames, whole

    name: ClassVar[str] = "last-frames"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1:
            raise LongtakeError(f"{self.name} of {self.frames} frames: keep at least 1")

    def budget(self, content: int) -> int:
        return self.frames * content

    @property
    def window(self) -> int:
        return self.frames

    def order(self, frame: Frame, mass: Tensor | None) -> Tensor:
        return frame.places.argsort()

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        frames = self.room(budget, shape) // shape.tokens_per_frame
        if frames < 1:
            least = (self.leading + 1 + shape.live_frames) * shape.tokens_per_frame
            raise LongtakeError(
                f"{budget} bytes: {self.name} keeps whole frames and needs {least * shape.token_bytes} bytes"
            )
        return replace(self, frames=frames)


@dataclass(frozen=True)
class SinkWindow(LastFrames):
    """The take's first frames for ever, and the newest ones; everything between is forgotten."""

    sink: int = 1  # first latent frames of the take

    name: ClassVar[str] = "sink-window"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink < 0:
            raise LongtakeError(f"{self.name} with a sink of {self.sink} frames: give 0 or more")

    @property
    def leading(self) -> int:
        return self.sink


@dataclass(frozen=True)
class Uniform(SlotPolicy):
    """The same part of each of the last frames, however old."""

    history_frames: float = 1.0  # the budget, in frames' worth of content tokens
    max_frames: int = 4  # history frames retained
    selection: str = "bayer"  # or "ardf", "stride", "random"
    budget_tokens: int | None = None  # the budget in tokens, instead of history_frames

    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history_frames < 0 or self.max_frames < 1 or (self.budget_tokens or 0) < 0:
            raise LongtakeError(
                f"uniform: {self.history_frames:g} frames over {self.max_frames}: history_frames ≥ 0, max_frames ≥ 1, "
                "budget_tokens ≥ 0"
            )
        if self.selection not in ORDERS:
            raise LongtakeError(f"selection {self.selection!r}: use one of {', '.join(ORDERS)}")

    def budget(self, content: int) -> int:
        return round(self.history_frames * content) if self.budget_tokens is None else self.budget_tokens

    @property
    def window(self) -> int:
        return self.max_frames

    def order(self, frame: Frame, mass: Tensor | None) -> Tensor:
        return ranks(self.selection, frame.whole, frame.block.grid)[frame.places].argsort()

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        room, content = self.room(budget, shape), shape.tokens_per_frame - shape.structural_tokens
        frames = self.spread(room, content, shape.structural_tokens, shape)
        tokens = room - frames * shape.structural_tokens
        if tokens < 1:
            raise LongtakeError(f"{budget} bytes leave {room} tokens of history for {frames} frames: lower max_frames")
        return replace(self, budget_tokens=min(tokens, frames * content), max_frames=frames)
