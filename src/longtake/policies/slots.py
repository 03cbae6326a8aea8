"""The machinery under PackCache and its equal-budget baselines: anchors, a token budget over the ages of the retained
frames, nested selection inside a frame, and slots.

Everything in view stands where it would stand in the video made of the retained frames alone: anchors first, then the
history without gaps, then the chunk in flight. Until something is evicted that is where it was written.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..plan import (
    FULL,
    Block,
    BlockTable,
    Drop,
    Entry,
    HistoryShape,
    Plan,
    Signals,
    TokenSet,
    as_tensor,
    difference,
    intersect,
)
from .allocation import allocate
from .base import KVPolicy


@dataclass(eq=False)
class Frame:
    """A latent frame of a block: which tokens it still owns, in the block's numbering."""

    block: Block
    number: int  # latent frame
    content: Tensor  # what a budget counts
    rest: Tensor  # structural tokens: kept as long as the frame is
    places: Tensor  # of `content` among the `whole` content tokens the frame was written with
    whole: int
    anchor: bool


@dataclass(frozen=True)
class SlotPolicy(KVPolicy):
    """Frames by age under a budget of content tokens. Subclasses say how much, for how many frames, in what shares and
    in which order."""

    @abstractmethod
    def budget(self, content: int) -> int:
        """Content tokens of all retained history, a frame having `content` of them."""

    @property
    @abstractmethod
    def window(self) -> int:
        """Most history frames retained, anchors apart."""

    def weights(self, frames: int) -> Sequence[Fraction]:
        """Shares of the budget, newest frame first."""
        return [Fraction(1, frames)] * frames

    @property
    def leading(self) -> int:
        """First latent frames of the take that are anchors, beside those the host marks."""
        return 0

    @property
    def moves(self) -> bool:
        """Whether what is retained moves to slots."""
        return True

    @abstractmethod
    def order(self, frame: Frame, mass: Tensor | None) -> Tensor:
        """Indices into the frame's `content`, the tokens to stay longest first. `mass`: what `evidence` has on them."""

    def evidence(self, table: BlockTable, signals: Signals) -> Mapping[int, Tensor]:
        """Block → a number for each token it owns, if the order goes by what was measured."""
        return {}

    def retain(self, owned: Sequence[int], content: int) -> list[int]:
        """Content tokens of each retained frame, newest first, of what it owns."""
        return allocate(self.budget(content), owned, self.weights(len(owned)))

    def anchored(self, content: int) -> int:
        """Content tokens of an anchor frame that stay."""
        return content

    def structure(self, frame: Frame) -> Tensor:
        """Structural tokens of a retained frame that stay."""
        return frame.rest

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        frames = [frame for block in table.blocks for frame in self._frames(block)]
        evidence = self.evidence(table, signals)
        anchors, history = [f for f in frames if f.anchor], [f for f in frames if not f.anchor]
        history = history[max(0, len(history) - self.window) :]  # first in, first out
        kept: dict[int, Tensor] = {}  # latent frame → tokens
        for frame in anchors:
            kept[frame.number] = self._tokens(frame, self.anchored(frame.whole), evidence)
        if history:
            newest = history[::-1]
            counts = self.retain([len(f.content) for f in newest], newest[0].whole)
            for frame, n in zip(newest, counts, strict=True):
                kept[frame.number] = self._tokens(frame, n, evidence)
            history = [f for f in history if len(kept[f.number])]
        first = history[0].number if history else table.now
        shift = len(anchors) - first if self.moves else 0

        entries, drops = [], []
        for block in table.blocks:
            if not block.span:  # a text
                entries.append(Entry(block.id))
                continue
            own = range(block.frame, block.end)
            fixed = [kept[f.number] for f in anchors if f.number in own]
            moved = [kept[f.number] for f in history if f.number in own]
            stays = torch.cat([*fixed, *moved]) if fixed or moved else torch.arange(0)
            lost = difference(block.forms[FULL].owned, stays)
            if len(lost):
                drops.append(Drop(block.id, tokens=lost if len(stays) else None))
            if fixed and moved and shift:
                entries.append(Entry(block.id, tokens=torch.cat(fixed)))
                entries.append(Entry(block.id, tokens=torch.cat(moved), shift=shift))
            elif fixed or moved:
                entries.append(Entry(block.id, shift=shift if moved else 0))
        return Plan(tuple(entries), tuple(drops), live_shift=shift)

    def capacity(self, shape: HistoryShape) -> int:
        content = shape.tokens_per_frame - shape.structural_tokens
        held = min(self.budget(content), self.window * content) + self.window * shape.structural_tokens
        rows = held + (self.leading + shape.live_frames) * shape.tokens_per_frame
        return rows if shape.frames is None else min(rows, shape.frames * shape.tokens_per_frame)

    def room(self, budget: int, shape: HistoryShape) -> int:
        """Rows that `budget` bytes leave for history beside the leading anchors and the chunks in flight. Raises
        LongtakeError if there is none."""
        apart = (self.leading + shape.live_frames) * shape.tokens_per_frame
        rows = budget // shape.token_bytes - apart
        if rows < 1:
            raise LongtakeError(
                f"{budget} bytes hold {max(0, rows + apart)} tokens: {self.name} needs {apart + 1}, "
                f"{(apart + 1) * shape.token_bytes} bytes, for the chunks in flight, its anchors and some history"
            )
        return rows

    def spread(self, room: int, content: int, structural: int, shape: HistoryShape) -> int:
        """Frames for `room` rows, a frame having so many tokens of each kind: as many to a frame's worth of content as
        these options have, but none at a slot that no training clip had; more if whole frames would not fill it."""
        to_one = max(1.0, self.window * content / max(1, self.budget(content)))
        frames = int(room * to_one / (content + to_one * structural))
        if shape.training_frames is not None:
            frames = min(frames, shape.training_frames - shape.live_frames - self.leading)
        return max(frames, self.window, math.ceil(room / (content + structural)))

    def _frames(self, block: Block) -> list[Frame]:
        """The block's latent frames of which anything is left, in time order."""
        frames = []
        for number in range(block.frame, block.end):
            owned = block.of_frames(number, number + 1)
            if not len(owned):
                continue
            per_frame = block.forms[FULL].tokens // block.span
            start = per_frame * (number - block.frame)
            written: TokenSet = range(start, start + per_frame)
            if block.packable is not None:
                written = intersect(written, block.packable)
            elif len(block.structural):
                written = difference(written, block.structural)
            content = as_tensor(intersect(owned, written))
            places = torch.searchsorted(as_tensor(written), content)
            anchor = block.role == "anchor" or number < self.leading
            rest = as_tensor(difference(owned, content))
            frames.append(Frame(block, number, content, rest, places, len(written), anchor))
        return frames

    def _tokens(self, frame: Frame, n: int, evidence: Mapping[int, Tensor]) -> Tensor:
        """What stays of a frame: `n` of its content tokens and its structure, ascending."""
        content = frame.content
        if n < len(content):
            mass = evidence.get(frame.block.id)
            if mass is not None:
                mass = mass[torch.searchsorted(as_tensor(frame.block.forms[FULL].owned), content)]
            content = content[self.order(frame, mass)[:n]]
        return torch.cat((content, self.structure(frame))).sort().values
