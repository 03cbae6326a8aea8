"""Where attention goes: mass per latent frame, layer and step, while a take runs and without changing a bit of it.

For queries of the chunk in flight and keys of a segment g: mass_g = exp(lse_g − lse), lse_g the log-sum-exp of the
segment's logits. A few hundred evenly spaced queries stand for all, in blocks, so nothing of size T×T ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention import logits, segment_mass
from ..errors import LongtakeError
from ..history import History, LayerView
from ..plan import Entry, intersect

ELEMENTS = 2**24  # logits held at once


@dataclass(frozen=True)
class Segment:
    """Consecutive keys in view: "text", an "anchor" frame, a "history" frame `age` latent frames before the first one
    of the chunk in flight, or the "current" chunk itself."""

    kind: str
    tokens: int
    frame: int = -1
    age: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "frame": self.frame, "age": self.age, "tokens": self.tokens}


@dataclass
class ChunkMass:
    """What the queries of one chunk looked at, in one stream: `mass` [steps][layers][segments], each row summing to 1,
    mean over queries, heads and takes."""

    stream: str
    frame: int
    segments: list[Segment]
    mass: list[list[list[float]]] = field(default_factory=list)

    def array(self) -> np.ndarray:
        """[steps, layers, segments]"""
        return np.asarray(self.mass)

    def as_dict(self) -> dict[str, Any]:
        return {
            "stream": self.stream, "frame": self.frame, "segments": [s.as_dict() for s in self.segments],
            "mass": np.round(self.array(), 7).tolist(),
        }  # fmt: skip


@dataclass(frozen=True)
class HeatMap:
    """Exact attention rows of one pass and layer, mean over heads and takes: `rows` [queries, bins] is the mass per
    token of every bin of keys; `borders` are the bins where a segment begins."""

    stream: str
    frame: int
    step: int
    layer: int
    rows: np.ndarray
    borders: list[int]
    kinds: list[str]


@dataclass
class MassProbe:
    """Watches a history. `anchors` first latent frames count as anchors beside those the host marks."""

    history: History
    queries: int = 256
    bins: int = 512
    anchors: int = 0
    heat_layers: tuple[int, ...] = ()  # whose heat map is kept, of the last step of the last chunk
    chunks: list[ChunkMass] = field(default_factory=list)
    heat: dict[tuple[str, int], HeatMap] = field(default_factory=dict)
    _blocks: dict[tuple[str, int], ChunkMass] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[MassProbe]:
        """Within it every denoising pass is measured; commit passes are not."""
        before, self.history.probe = self.history.probe, self
        try:
            yield self
        finally:
            self.history.probe = before

    def __call__(self, stream: str, block: int, write: bool, layers: list[LayerView]) -> None:
        if write:
            return
        chunk = self._blocks.get((stream, block))
        if chunk is None:
            chunk = ChunkMass(stream, self.history.table().now, self._segments(stream, block))
            self._blocks[stream, block] = chunk
            self.chunks.append(chunk)
        step: list[list[float]] = []
        chunk.mass.append(step)
        for number, layer in enumerate(layers):
            layer.observe = self._watch(chunk, step, number, layer.observe)

    def _watch(self, chunk: ChunkMass, step: list[list[float]], layer: int, policy: Any) -> Any:
        lengths = [segment.tokens for segment in chunk.segments]

        def observe(q: Tensor, k: Tensor) -> None:
            if policy is not None:
                policy(q, k)
            rows = sample(q, self.queries)
            block = max(1, ELEMENTS // (q.shape[0] * q.shape[2] * k.shape[1]))
            step.append(segment_mass(rows, k, lengths, block).mean((0, 1)).tolist())
            if layer in self.heat_layers:
                heat, borders = heat_rows(rows, k, lengths, self.bins)
                kinds = [segment.kind for segment in chunk.segments]
                at = len(chunk.mass) - 1
                self.heat[chunk.stream, layer] = HeatMap(chunk.stream, chunk.frame, at, layer, heat, borders, kinds)

        return observe

    def _segments(self, stream: str, live: int) -> list[Segment]:
        """The keys a pass sees, in view order. Raises LongtakeError where they are not all the same for every head."""
        table, plan = self.history.table(), self.history.views[stream].plan
        blocks = {b.id: b for b in (*table.blocks, *table.live)}
        if plan is None or len(table.live) > 1:
            raise LongtakeError(
                "attention is analysed with one chunk in flight: use a sampler that makes one at a time"
            )
        store = self.history.stores[stream]
        found = []
        for entry in plan.entries:
            if not isinstance(entry, Entry) or entry.heads is not None or entry.log_weight or entry.form != "full":
                raise LongtakeError(
                    "attention is analysed under a policy that shows whole heads the same plain tokens: use full, "
                    "window or packcache"
                )
            block = blocks[entry.block]
            if not block.span:
                found.append(Segment("text", len(store.held[block.id, "full"].rows)))
                continue
            for frame in range(block.frame, block.end):
                tokens = block.of_frames(frame, frame + 1)
                tokens = tokens if entry.tokens is None else intersect(tokens, entry.tokens)
                if len(tokens):
                    anchor = block.role == "anchor" or frame < self.anchors
                    kind = "anchor" if anchor else "history"
                    found.append(Segment(kind, len(tokens), frame, table.now - frame))
        return [*found, Segment("current", blocks[live].forms["full"].count, blocks[live].frame)]


def sample(q: Tensor, most: int) -> Tensor:
    """At most `most` evenly spaced queries of q [B, N, H, D]."""
    n = q.shape[1]
    return q if n <= most else q[:, torch.linspace(0, n - 1, most).round().long().to(q.device)]


def heat_rows(q: Tensor, k: Tensor, lengths: list[int], bins: int) -> tuple[np.ndarray, list[int]]:
    """Softmax rows of q against k, mean over takes and heads, gathered into at most about `bins` bins that never cross
    a segment's border: mass per token [queries, bins], and each segment's first bin. Two passes over the segments: the
    log-sum-exp first, then the probabilities."""
    keys = list(k.split(lengths, 1))
    lse = torch.stack([logits(q, part).logsumexp(-1) for part in keys]).logsumexp(0)  # [B, H, Nq]
    columns: list[Tensor] = []
    borders: list[int] = []
    for part, n in zip(keys, lengths, strict=True):
        borders.append(sum(c.shape[1] for c in columns))
        if not n:
            continue
        count = min(n, max(1, bins * n // sum(lengths)))
        at = torch.arange(n, device=k.device) * count // n  # bin of each key
        mass = (logits(q, part) - lse.unsqueeze(-1)).exp().mean((0, 1))  # [Nq, n]
        binned = mass.new_zeros(mass.shape[0], count).index_add(1, at, mass)
        columns.append(binned / torch.bincount(at, minlength=count))
    return torch.cat(columns, 1).cpu().numpy(), borders
