"""Which blocks of the middle PackForcing shows, chunk by chunk and layer by layer, and how demand spreads over the
history: by age, over blocks, between layers and from chunk to chunk, each beside what picking at random would give."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongtakeError
from ..hosts.base import Host
from ..named import spec
from ..policies import PackForcing
from ..session import Session
from .provenance import provenance, write_report

SCHEMA = 1


@dataclass(frozen=True)
class Picks:
    """One chunk: `candidates` are chunk numbers of the middle, `picked` those shown, by layer."""

    chunk: int
    candidates: tuple[int, ...]
    picked: tuple[tuple[int, ...], ...]


@dataclass
class SelectionReport:
    """What was picked in one take, for the first stream."""

    model: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    chunks: list[Picks] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.chunks[0].picked)

    def demand(self) -> list[tuple[int, float, float]]:
        """By age in chunks: how often a block of that age was picked when it was a candidate, over chunks and layers,
        and how often picking at random would have."""
        hits: dict[int, int] = {}
        chances: dict[int, int] = {}
        expected: dict[int, float] = {}
        for c in self.chunks:
            share = len(c.picked[0]) / len(c.candidates)
            for block in c.candidates:
                age = c.chunk - block
                hits[age] = hits.get(age, 0) + sum(block in layer for layer in c.picked)
                chances[age] = chances.get(age, 0) + len(c.picked)
                expected[age] = expected.get(age, 0.0) + share * len(c.picked)
        return [(age, hits[age] / chances[age], expected[age] / chances[age]) for age in sorted(hits)]

    def spread(self) -> dict[str, float]:
        """Summary numbers, means over chunks (and layers).

        `effective_blocks`: exp of the entropy of a chunk's picks over the candidates, all layers together;
        `of_candidates` their number; `newest`: part of the picks among the newest k candidates, beside
        `newest_at_random`;
        `jaccard_next_chunk` and `jaccard_layers`: distance of pick sets of consecutive chunks, and of pairs of layers,
        each beside that of random sets of k of the candidates."""
        rows = [self._row(c) for c in self.chunks]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        pairs = list(zip(self.chunks, self.chunks[1:], strict=False))
        follow = [_jaccard(a, b) for one, two in pairs for a, b in zip(one.picked, two.picked, strict=True)]
        mean["jaccard_next_chunk"] = float(np.mean(follow)) if follow else math.nan
        return mean

    def _row(self, c: Picks) -> dict[str, float]:
        m, k = len(c.candidates), len(c.picked[0])
        counts = np.array([sum(block in layer for layer in c.picked) for block in c.candidates], dtype=float)
        shares = counts[counts > 0] / counts.sum()
        newest = set(c.candidates[-k:])
        between = [_jaccard(a, b) for i, a in enumerate(c.picked) for b in c.picked[i + 1 :]]
        common = k * k / m  # expected of two random sets
        return {
            "effective_blocks": float(np.exp(-(shares * np.log(shares)).sum())), "of_candidates": float(m),
            "newest": float(np.mean([len(newest.intersection(layer)) / k for layer in c.picked])),
            "newest_at_random": k / m,
            "jaccard_layers": float(np.mean(between)) if between else 0.0,
            "jaccard_at_random": 1 - common / (2 * k - common),
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "analysis": "selection", "model": self.model, "settings": self.settings,
            "spread": {key: None if math.isnan(x) else x for key, x in self.spread().items()},
            "demand_by_age": [
                {"age": age, "picked": picked, "at_random": random} for age, picked, random in self.demand()
            ],
            "chunks": [
                {"chunk": c.chunk, "candidates": list(c.candidates), "picked": [list(layer) for layer in c.picked]}
                for c in self.chunks
            ],
            "provenance": self.provenance,
        }  # fmt: skip

    def text(self) -> str:
        s = self.spread()
        first, last = self.chunks[0], self.chunks[-1]
        return "\n".join([
            f"{self.model}: {len(self.chunks)} chunks, {len(first.picked[0])} of {len(first.candidates)} to "
            f"{len(last.candidates)} blocks picked, {self.layers} layers",
            f"  demand is spread over {s['effective_blocks']:.1f} of {s['of_candidates']:.1f} blocks (mean of chunks)",
            f"  among the newest k: {s['newest']:.1%} of the picks, at random {s['newest_at_random']:.1%}",
            f"  Jaccard distance to the next chunk {s['jaccard_next_chunk']:.2f}, between layers "
            f"{s['jaccard_layers']:.2f}, at random {s['jaccard_at_random']:.2f}",
        ])  # fmt: skip

    def write(self, folder: Path, stem: str = "selection") -> list[Path]:
        """`stem`.json and the figures in `folder`. Raises LongtakeError if they cannot be written."""
        from .selection_figures import figures

        return write_report(folder, stem, json.dumps(self.as_dict()), figures(self))


def measure(
    host: Host, prompt: str | None = None, *, policy: PackForcing | None = None, chunks: int = 100, **options: Any
) -> SelectionReport:
    """A take of `chunks` chunks under `policy`, with every choice recorded; options go to the session.

    Raises LongtakeError for a policy without choices, and for a take too short to come to one."""
    policy = policy or PackForcing()
    if policy.select != "top" or not policy.top_k:
        raise LongtakeError(f"{spec(policy)} chooses nothing: give select=top and top_k of 1 or more")
    least = policy.sink + policy.recent + policy.top_k + 2
    if chunks < least:
        raise LongtakeError(f"{chunks} chunks: the first choice is made for chunk {least}, so ask for {least} or more")
    found: list[Picks] = []

    def look(session: Session, step: int, timestep: float, given: dict[str, Any]) -> None:
        if step == len(session.schedule.timesteps) - 1:
            found.extend(_picks(session))

    given = {"decode": False, "chunks": chunks, **options} | ({} if prompt is None else {"prompt": prompt})
    take = Session(host, policy, callback_on_step_end=look, **given)
    for _ in take:
        pass
    told = {"prompt": prompt, "chunks": chunks, "policy": spec(take.policy), "seed": options.get("seed", 0)}
    if take.compressor is not None:
        told["compressor"] = take.compressor.describe()
    return SelectionReport(host.name, told, provenance(host.device), found)


def _picks(session: Session) -> Iterator[Picks]:
    """The choice of the chunk in flight, if its plan had one; chunks are numbered by their place in the take."""
    span = session.geometry.chunk_frames
    number = {block.id: block.frame // span for block in session.history.table().blocks}
    for choice in session.history.chosen():
        layers = [choice[layer] for layer in sorted(choice)]
        candidates = layers[0][0]
        picked = tuple(tuple(number[candidates[i]] for i in places[0].tolist()) for _, places in layers)
        yield Picks(session.frame // span, tuple(number[block] for block in candidates), picked)


def _jaccard(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Distance of two sets: 0 for equal ones, 1 for disjoint ones."""
    union = len(set(a) | set(b))
    return 1 - len(set(a) & set(b)) / union if union else 0.0
