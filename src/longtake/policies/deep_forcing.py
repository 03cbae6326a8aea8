"""Deep Forcing (arXiv 2512.05081), training-free: a deep sink that moves along with the window, and participative
compression: whenever the window is full, all tokens between sink and recent part but the ones that the newest queries
attend to most are forgotten.

Differences to the published port: sink and recent part are whole chunks, queries are those of the chunk's first step
alone (the port's mix noise levels), and nothing is left out between the newest frames and the chunk in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from ..errors import LongtakeError
from ..plan import FULL, BlockTable, Entry, Fuse, HistoryShape, Plan, Signals, pack_right
from .base import KVPolicy


@dataclass(frozen=True)
class DeepForcing(KVPolicy):
    """At most `frames` latent frames are seen, the chunk in flight included.

    `sink` and `recent` count chunks (3 and 1 of three frames: the paper's 10 and 4 frames in whole chunks, of which the
    recent ones include the chunk in flight); `top` is how many frames' worth of tokens survive a compression. Layers
    choose for themselves, heads together.
    """

    frames: int = 21
    sink: int = 3
    recent: int = 1
    top: int = 2

    name: ClassVar[str] = "deep-forcing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1 or self.sink < 0 or self.recent < 0 or self.top < 1:
            raise LongtakeError(
                f"deep-forcing: frames={self.frames}, sink={self.sink}, recent={self.recent}, top={self.top}: "
                "frames ≥ 1, sink ≥ 0, recent ≥ 0 and top ≥ 1"
            )

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        blocks = list(table.blocks)
        anchors = [b for b in blocks if b.role == "anchor"]
        blocks = blocks[len(anchors) :]
        last = max(min(self.sink, len(blocks)), len(blocks) - self.recent)
        sink, middle, recent = blocks[: self.sink], blocks[self.sink : last], blocks[max(self.sink, last) :]
        width = lambda b: self.top if b.role == "fused" else b.span
        kept: list[tuple[Entry | Fuse, int, int]] = [(Entry(b.id), b.frame, width(b)) for b in (*anchors, *sink)]
        if sum(map(width, blocks)) + table.span > self.frames and sum(map(width, middle)) > self.top:
            per_frame = table.live[0].forms[FULL].tokens // table.live[0].span
            fuse = Fuse(tuple(b.id for b in middle), self.top * per_frame, per_frame=per_frame)
            kept.append((fuse, middle[0].frame, self.top))
        else:
            kept += [(Entry(b.id), b.frame, width(b)) for b in middle]
        kept += [(Entry(b.id), b.frame, width(b)) for b in recent]
        return Plan(tuple(pack_right(kept, table.now)))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """φ_j = Σ_r q_r · k_j over the newest queries r and all heads, by √d and heads: the same for every head,
        [B, Hk, Nk]."""
        heads = k.shape[2]
        total = q.float().sum(1).unflatten(1, (heads, -1)).sum(2)  # [B, Hk, D]
        phi = (total[:, None] * k.float()).sum((2, 3)) * (q.shape[-1] ** -0.5 / q.shape[2])
        return phi[:, None].expand(-1, heads, -1)

    def capacity(self, shape: HistoryShape) -> int:
        """A chunk more than is seen: what is compressed is all there until the first forward is through."""
        frames = self.frames + shape.chunk_frames
        return shape.tokens_per_frame * (frames if shape.frames is None else min(frames, shape.frames))

    def visible(self, shape: HistoryShape) -> int:
        return shape.tokens_per_frame * (self.frames if shape.frames is None else min(self.frames, shape.frames))

    def fused(self, shape: HistoryShape) -> int:
        ends = shape.frames is not None and shape.frames <= self.frames  # before anything is compressed
        return 0 if ends else self.top * shape.tokens_per_frame

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        """The longest window; a smaller sink where it must be."""
        frames = budget // shape.frame_bytes - shape.chunk_frames
        for sink in range(self.sink, -1, -1):
            if frames >= self._least(sink, shape):
                return replace(self, frames=frames, sink=sink)
        least = (self._least(0, shape) + shape.chunk_frames) * shape.frame_bytes
        raise LongtakeError(f"{budget} bytes: deep-forcing needs {least}")

    def check(self, shape: HistoryShape) -> None:
        least = self._least(self.sink, shape)
        if self.frames < least:
            raise LongtakeError(
                f"deep-forcing: sink, recent part, {self.top} frames of the middle and the chunk in flight do not fit "
                f"{self.frames} frames: use frames={least} or more"
            )

    def _least(self, sink: int, shape: HistoryShape) -> int:
        return (sink + self.recent + 1) * shape.chunk_frames + self.top
