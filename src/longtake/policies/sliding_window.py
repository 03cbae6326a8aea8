"""Sliding window with a sink: see the first few latent frames and the most recent ones.

The policy of Self-Forcing and LongLive (absolute positions), and with `positions="slots"` the relative variants of
LongLive and Infinity-RoPE: what is kept moves up against the chunk in flight, so no distance ever exceeds the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..errors import LongtakeError
from ..plan import FULL, Block, BlockTable, Drop, Entry, HistoryShape, Plan, Signals, difference, pack_right
from .base import KVPolicy


@dataclass(frozen=True)
class SlidingWindow(KVPolicy):
    """`frames` latent frames are attended in all, the chunk in flight included (Self-Forcing's `local_attn_size`)."""

    frames: int = 21
    sink: int = 3  # first latent frames of the take, never evicted
    positions: str = "absolute"  # or "slots": kept frames are packed against the chunk in flight

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1 or self.sink < 0:
            raise LongtakeError(f"window of {self.frames} frames with sink {self.sink}: frames ≥ 1 and sink ≥ 0")
        if self.positions not in ("absolute", "slots"):
            raise LongtakeError(f"positions {self.positions!r}: use 'absolute' or 'slots'")

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        recent = table.now - max(0, self.frames - self.sink - table.span)  # first frame of the recent part
        seen: list[tuple[Entry, int, int]] = []
        drops = []
        for block in table.blocks:
            if block.role == "anchor":  # a host's text, an image it was told never to lose
                seen.append((Entry(block.id), block.frame, block.span))
                continue
            parts = self._parts(block, recent)
            if not block.complete:  # what is gone takes no slot
                parts = [run for first, last in parts for run in block.runs(first, last)]
            for first, last in parts:
                tokens = block.of_frames(first, last)
                seen.append((Entry(block.id, tokens=tokens), first, last - first))
            if not parts:
                drops.append(Drop(block.id))
            elif sum(last - first for first, last in parts) < block.span:
                lost = block.forms[FULL].owned
                for first, last in parts:
                    lost = difference(lost, block.of_frames(first, last))
                if len(lost):
                    drops.append(Drop(block.id, tokens=lost))
        entries = [entry for entry, _, _ in seen] if self.positions == "absolute" else pack_right(seen, table.now)
        return Plan(tuple(entries), tuple(drops))

    def flush(self, table: BlockTable) -> tuple[Drop, ...]:
        """Everything but the take's first frame and its last two (Infinity-RoPE)."""
        drops = []
        for block in table.blocks:
            if block.role == "anchor":
                continue
            lost = block.forms[FULL].owned
            for first, last in ((0, 1), (table.frames_seen - 2, table.frames_seen)):
                lost = difference(lost, block.of_frames(first, last))
            if len(lost):
                drops.append(Drop(block.id, tokens=None if len(lost) == block.forms[FULL].count else lost))
        return tuple(drops)

    def _parts(self, block: Block, recent: int) -> list[tuple[int, int]]:
        """The runs of the block's frames that are kept: sink frames, recent frames, or both at once."""
        sink_end, recent = min(self.sink, block.end), max(recent, block.frame)
        if sink_end >= recent:
            return [(block.frame, block.end)]
        runs = [(block.frame, sink_end), (recent, block.end)]
        return [(first, last) for first, last in runs if first < last]

    def capacity(self, shape: HistoryShape) -> int:
        frames = self.frames if shape.frames is None else min(self.frames, shape.frames)
        return frames * shape.tokens_per_frame

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        frames, least = budget // shape.frame_bytes, shape.live_frames
        if frames < max(1, least):
            raise LongtakeError(
                f"{budget} bytes hold {frames} latent frames: a window needs at least the {least} in flight, "
                f"{least * shape.frame_bytes} bytes"
            )
        return replace(self, frames=frames, sink=min(self.sink, max(0, frames - least)))

    def check(self, shape: HistoryShape) -> None:
        least = self.sink + shape.live_frames
        if self.frames < least:
            raise LongtakeError(
                f"window of {self.frames} frames with sink {self.sink}: the chunks in flight take {shape.live_frames}, "
                f"so use frames={least} or more"
            )
