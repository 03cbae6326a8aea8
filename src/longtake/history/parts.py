"""What a view is made of: `Plain` blocks (all heads share their tokens), `Fused` ones (tokens and positions per head),
and the two open kinds that wait for the queries of a first forward, `Chosen` and `Fusing`. A part's size never depends
on what is picked, so shapes are known before the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..rope import RotaryTable
from .store import Rows, Store, span, stretches

Score = Callable[[Tensor, Tensor], Tensor]
Fill = Callable[[Tensor | None], None]
MANY_PIECES = 16  # above this, one gather is cheaper than copying stretch by stretch


class Part:
    """`n` tokens of the view, the same number in every layer."""

    n: int

    def open(self, layer: int) -> bool:
        """Whether this layer still waits for the queries of a first forward."""
        return False

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        """Write the part into its place in a layer's view: k, v [B, n, H, D], rotated."""
        raise NotImplementedError

    def bind(self, layer: int, k: Tensor, v: Tensor) -> Fill:
        """`fill` for a place that stays the same while the plan is in force: called with the queries."""
        return partial(self.fill, layer, k, v)


class Plain(Part):
    """Tokens every head sees, gathered and rotated to where the plan puts them."""

    def __init__(self, store: Store, rotary: RotaryTable, rows: Tensor, shift: Tensor, pieces: int) -> None:
        self.store, self.rotary, self.n = store, rotary, len(rows)
        at = rows.to(store.base.device)
        position = store.base[at] + shift.to(store.base)[:, None] * store.step[at]
        self.phases = rotary.phases(position)
        self.rows = at
        self.pieces = stretches(rows, pieces)

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        if len(self.pieces) > MANY_PIECES:  # tokens were dropped one by one
            torch.index_select(self.store.k[layer], 1, self.rows, out=k)
            torch.index_select(self.store.v[layer], 1, self.rows, out=v)
            self.rotary.rotate(k, self.phases, out=k)
            return
        for start, rows in self.pieces:  # half the memory passes of a gather
            to = slice(start, start + rows.stop - rows.start)
            self.rotary.rotate(self.store.k[layer][:, rows], self.phases[to], out=k[:, to])
            v[:, to].copy_(self.store.v[layer][:, rows])

    def bind(self, layer: int, k: Tensor, v: Tensor) -> Fill:
        keys, values = self.store.k[layer], self.store.v[layer]
        whole = self.rotary.pairing == "interleaved" and 2 * self.rotary.pairs == k.shape[-1]
        if len(self.pieces) > MANY_PIECES or k.dtype != torch.float32 or not whole:
            return super().bind(layer, k, v)
        # Slices and complex views, made once: in a small model they cost as much time as the bytes they move.
        turns, copies = [], []
        phases = torch.view_as_complex(self.phases).unsqueeze(1)  # [n, 1, P]: broadcast over heads
        for start, rows in self.pieces:
            to = slice(start, start + rows.stop - rows.start)
            turns.append((_complex(keys[:, rows]), phases[to], _complex(k[:, to])))
            copies.append((v[:, to], values[:, rows]))

        def fill(q: Tensor | None) -> None:
            if torch.compiler.is_compiling():  # inductor has no complex kernels
                self.fill(layer, k, v, q)
                return
            for source, phase, target in turns:
                torch.mul(source, phase, out=target)
            for target, source in copies:
                target.copy_(source)

        return fill


def _complex(x: Tensor) -> Tensor:
    """Interleaved pairs of channels as complex numbers: [..., D] → [..., D / 2]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class Fused(Part):
    """A fused block: every head has tokens, and so positions, of its own."""

    def __init__(self, store: Store, rotary: RotaryTable, held: Rows, shift: float) -> None:
        self.store, self.rotary, self.held, self.shift, self.n = store, rotary, held, shift, len(held.rows)
        self.at = span(held.rows)

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        base, step = self.held.head_base, self.held.head_step
        assert base is not None and step is not None
        phases = self.rotary.phases(base[layer].double() + self.shift * step[layer])  # [B, n, H, P, 2]
        self.rotary.rotate(self.store.k[layer][:, self.at], phases, out=k)
        v.copy_(self.store.v[layer][:, self.at])


class Chosen(Part):
    """k of M equally long blocks, picked per layer and take by score, then frozen."""

    def __init__(
        self, store: Store, rotary: RotaryTable, candidates: Sequence[Rows], frames: Sequence[int], k: int,
        starts: Sequence[float] | None, score: Score,
    ) -> None:  # fmt: skip
        self.store, self.rotary, self.k, self.score = store, rotary, k, score
        device = store.base.device
        self.rows = torch.stack([c.rows for c in candidates]).to(device)  # [M, c]
        self.sums = [c.key_sum for c in candidates]
        self.frames = torch.tensor(frames, dtype=torch.float64, device=device)
        self.starts = None if starts is None else torch.tensor(starts, dtype=torch.float64, device=device)
        self.n = k * self.rows.shape[1]
        self.picked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # layer → blocks [B, k], rows [B, n], phases

    def open(self, layer: int) -> bool:
        return layer not in self.picked

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        if layer not in self.picked:
            assert q is not None
            self.picked[layer] = self._pick(layer, q)
        _, rows, phases = self.picked[layer]
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
        self.rotary.rotate(self.store.k[layer][batch, rows], phases, out=k)
        v.copy_(self.store.v[layer][batch, rows])

    def _pick(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.stack([s[layer] for s in self.sums if s is not None], 1)  # [B, M, H, D]
        best = self.score(q, sums).topk(self.k, dim=1).indices.sort(1).values  # [B, k], time order
        rows = self.rows[best].flatten(1)  # [B, n]
        position = self.store.base[rows]  # [B, n, axes]
        if self.starts is not None:
            shift = (self.starts - self.frames[best]).repeat_interleave(self.rows.shape[1], 1)
            position = position + shift[..., None] * self.store.step[rows]
        return best, rows, self.rotary.phases(position).unsqueeze(2)  # [B, n, 1, P, 2]


class Fusing(Part):
    """Blocks being replaced by their best n tokens per layer and head, while the first forward runs.

    The survivors take over the first n rows: a layer's rows are read, and then rewritten, by that layer alone.
    """

    def __init__(
        self, store: Store, rotary: RotaryTable, sources: Sequence[Rows], n: int, shift: float, sort: bool,
        score: Score | None,
    ) -> None:  # fmt: skip
        self.store, self.rotary, self.shift, self.n, self.score = store, rotary, shift, n, score
        self.sources, self.sort = sources, sort
        self.rows = torch.cat([s.rows for s in sources])
        self.at = self.rows.to(store.base.device)
        layers, batch, _, heads, _ = store.k.shape
        axes = store.base.shape[1]
        shape = (layers, batch, n, heads, axes)
        base = torch.zeros(shape, dtype=torch.float32, device=store.base.device)
        self.fused = Rows(self.rows[:n], torch.arange(n), base, torch.zeros_like(base))
        self.done: set[int] = set()
        self.seen = Fused(store, rotary, self.fused, shift)

    def open(self, layer: int) -> bool:
        return layer not in self.done

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        if layer not in self.done:
            assert q is not None
            self.resolve(layer, q=q)
        self.seen.fill(layer, k, v, None)

    def resolve(self, layer: int, *, q: Tensor | None = None, keep: Tensor | None = None) -> None:
        """Fuse one layer, keeping `keep` [B, H, n] or, if that is open, the best by the policy's score."""
        keys, values = (t[layer].index_select(1, self.at) for t in (self.store.k, self.store.v))  # [B, M, H, D]
        base, step = self._positions(layer)  # [B, M, H, axes]
        if keep is None:
            assert q is not None and self.score is not None
            rotated = self.rotary.rotate(keys, self.rotary.phases(base + self.shift * step))
            keep = self.score(q, rotated).topk(self.n, dim=-1).indices  # [B, H, n], best first
        keep = keep.sort(-1).values if self.sort else keep
        index = keep.transpose(1, 2).unsqueeze(-1)  # [B, n, H, 1]
        gather = lambda x: x.gather(1, index.expand(-1, -1, -1, x.shape[-1]))
        assert self.fused.head_base is not None and self.fused.head_step is not None
        self.fused.head_base[layer] = gather(base)
        self.fused.head_step[layer] = gather(step)
        at = self.at[: self.n]
        self.store.k[layer][:, at] = gather(keys)
        self.store.v[layer][:, at] = gather(values)
        self.done.add(layer)

    def _positions(self, layer: int) -> tuple[Tensor, Tensor]:
        batch, heads = self.store.k.shape[1], self.store.k.shape[3]
        parts: list[tuple[Tensor, Tensor]] = []
        for source in self.sources:
            if source.head_base is not None and source.head_step is not None:
                parts.append((source.head_base[layer].double(), source.head_step[layer].double()))
            else:
                rows = source.rows.to(self.store.base.device)
                spread = lambda x: x[None, :, None].expand(batch, -1, heads, -1)
                parts.append((spread(self.store.base[rows]), spread(self.store.step[rows])))
        return torch.cat([b for b, _ in parts], 1), torch.cat([s for _, s in parts], 1)
