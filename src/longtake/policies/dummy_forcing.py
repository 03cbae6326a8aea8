"""Dummy Forcing (arXiv 2601.20499), training-free: half of all heads hardly look at the past, and get to see only the
newest frame of it; the others see either the first frame or the newest ones, whichever they attend to more.

Heads are told apart once, by the attention mass of an early chunk's commit pass (queries sampled with a seed: the
original's draw differs from run to run), and keep their group for the take, whatever the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..attention import segment_mass
from ..errors import LongtakeError
from ..plan import FULL, Block, BlockTable, Drop, Entry, HistoryShape, Plan, Signals, difference
from .base import KVPolicy

FIRST, MIDDLE, DUMMY = 0, 1, 2


@dataclass(frozen=True)
class DummyForcing(KVPolicy):
    """Heads in three groups.

    `dummy` is the share of heads, over all layers, that see the last frame only; `local` is how many newest frames the
    middle heads see; `after` counts the chunks before the one whose queries tell heads apart (1; LongLive's weights 2),
    and `seed` draws those queries, a third of a frame's.
    """

    dummy: float = 0.5
    local: int = 3
    after: int = 1
    seed: int = 0

    name: ClassVar[str] = "dummy-forcing"
    moment: ClassVar[str | None] = "commit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dummy <= 1 or self.local < 1 or self.after < 1:
            raise LongtakeError(
                f"dummy-forcing: dummy={self.dummy:g}, local={self.local}, after={self.after}: dummy in [0, 1], local "
                "and after ≥ 1"
            )

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        anchors = tuple(Entry(b.id) for b in table.blocks if b.role == "anchor")
        blocks = [b for b in table.blocks if b.role != "anchor"]
        if not any(signals.scores.values()):
            chunk = table.live[0]
            entries = (*anchors, *(Entry(b.id) for b in blocks))
            if table.now < self.after * chunk.span:
                return Plan(entries, observe=())
            frame = chunk.forms[FULL].tokens // chunk.span
            text = sum(b.forms[FULL].count for b in table.blocks if b.role == "anchor")
            score = partial(masses, text=text, frame=frame, current=chunk.forms[FULL].tokens, seed=self.seed)
            return Plan(entries, score=score)
        groups = {stream: self._grouped(layers) for stream, layers in signals.scores.items()}
        heads = lambda *which: {s: torch.isin(g, torch.tensor(which, device=g.device)) for s, g in groups.items()}
        local = table.now - self.local
        first = (FIRST,) if local > 0 else (FIRST, MIDDLE)
        shown = [(0, 1, heads(*first)), (max(1, local), table.now - 1, heads(MIDDLE)),
                 (table.now - 1, table.now, heads(MIDDLE, DUMMY))]  # fmt: skip
        parts = [part for a, b, who in shown for part in _entries(blocks, a, b, who)]
        return Plan((*anchors, *parts), tuple(_rest(blocks, shown)), observe=())

    def _grouped(self, layers: Mapping[int, Tensor]) -> Tensor:
        """Group of every head, each take for itself: masses [B, H, 3] by layer → [L, B, H]."""
        mass = torch.stack([layers[layer] for layer in sorted(layers)])  # [L, B, H, 3]
        count = round(self.dummy * mass.shape[0] * mass.shape[2])
        return torch.stack([group(take, count) for take in mass.unbind(1)], 1)

    def covers(self, table: BlockTable) -> bool:
        """Never, with a past: no table says whether the heads are told apart already."""
        return not table.blocks

    def flush(self, table: BlockTable) -> tuple[Drop, ...]:
        """Everything but the frames that some head sees at the next chunk anyway."""
        blocks = [b for b in table.blocks if b.role != "anchor"]
        return tuple(_rest(blocks, [(0, 1, None), (table.frames_seen - self.local, table.frames_seen, None)]))

    def capacity(self, shape: HistoryShape) -> int:
        most = max(1 + self.local, self._untold(shape)) + shape.live_frames
        return shape.tokens_per_frame * (most if shape.frames is None else min(most, shape.frames))

    def _untold(self, shape: HistoryShape) -> int:
        """Latent frames of the past when heads are told apart: `after` chunks and a given beginning, which is an image
        or, with several chunks in flight, any part of a chunk."""
        return self.after * shape.chunk_frames + (1 if shape.live_chunks == 1 else shape.chunk_frames - 1)

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        """More local frames."""
        frames = budget // shape.frame_bytes
        least = max(2, self._untold(shape)) + shape.live_frames
        if frames < least:
            raise LongtakeError(f"{budget} bytes: dummy-forcing needs {least * shape.frame_bytes}")
        return replace(self, local=frames - 1 - shape.live_frames)


def masses(q: Tensor, k: Tensor, *, text: int, frame: int, current: int, seed: int) -> Tensor:
    """Mean attention mass [B, Hk, 3] of sampled queries on the first frame, on everything between, and on the chunk
    itself: `text` keys before the first frame's `frame` ones, and the last `current` ones. A text is left out."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(q.shape[1], generator=generator)[: max(1, frame // 3)].sort().values
    return sampled_masses(q, k, rows.to(q.device), text, frame, current)


def sampled_masses(q: Tensor, k: Tensor, rows: Tensor, text: int, first: int, last: int) -> Tensor:
    lengths = (text, first, k.shape[1] - text - first - last, last)
    mass = segment_mass(q[:, rows], k, lengths)[..., 1:]  # [B, Hq, 3]
    return mass.unflatten(1, (k.shape[2], -1)).mean(2)


def group(mass: Tensor, dummies: int) -> Tensor:
    """FIRST, MIDDLE or DUMMY for every head, [L, H], of masses [L, H, 3] on first frame, middle and current chunk.

    First and middle are normalised over all heads; a head costs the larger of the two, and the cheapest are dummies."""
    first, middle = (mass[..., i] / mass[..., i].sum().clamp_min(1e-12) for i in (0, 1))
    groups = torch.where(first < middle, MIDDLE, FIRST)
    cheapest = torch.maximum(first, middle).flatten().argsort(stable=True)[:dummies]
    return groups.flatten().index_fill(0, cheapest, DUMMY).unflatten(0, first.shape)


def _entries(blocks: list[Block], first: int, last: int, heads: dict[str, Tensor]) -> list[Entry]:
    """The frames [first, last) of the take, for some heads."""
    parts = [(b.id, b.of_frames(first, last)) for b in blocks]
    return [Entry(block, tokens=tokens, heads=heads) for block, tokens in parts if len(tokens)]


def _rest(blocks: list[Block], shown: Sequence[tuple[int, int, object]]) -> list[Drop]:
    """What is shown to no head."""
    drops = []
    for block in blocks:
        lost = block.forms[FULL].owned
        for first, last, _ in shown:
            lost = difference(lost, block.of_frames(first, last))
        if len(lost):
            drops.append(Drop(block.id, tokens=None if len(lost) == block.forms[FULL].count else lost))
    return drops
