"""What a view is made of: `Plain` blocks (all heads share their tokens), `Fused` ones (tokens and positions per head),
and the two open kinds that wait for the queries of a first forward, `Chosen` and `Fusing`. A part's size never depends
on what is picked, so shapes are known before the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..plan import Choose
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
        if self.store.kernels:
            self.store.show(layer, self.rows, self.phases, self.rotary, k, v)
            return
        if len(self.pieces) > MANY_PIECES:  # tokens were dropped one by one
            self.store.gather(layer, self.rows, k, v)
            self.rotary.rotate(k, self.phases, out=k)
            return
        for start, rows in self.pieces:  # half the memory passes of a gather
            to, at = slice(start, start + rows.stop - rows.start), (slice(None), rows)
            self.rotary.rotate(self.store.keys(layer, at, k[:, to]), self.phases[to], out=k[:, to])
            self.store.copy_values(layer, at, v[:, to])

    def bind(self, layer: int, k: Tensor, v: Tensor) -> Fill:
        keys, values = self.store.k[layer], self.store.v[layer]
        whole = self.rotary.pairing == "interleaved" and 2 * self.rotary.pairs == k.shape[-1]
        read = self.store.form is not None or self.store.kernels
        if len(self.pieces) > MANY_PIECES or k.dtype != torch.float32 or not whole or read:
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
        self.at = (slice(None), span(held.rows))

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        self.rotary.rotate(self.store.keys(layer, self.at, k), self.phases(layer), out=k)
        self.store.copy_values(layer, self.at, v)

    def phases(self, layer: int) -> Tensor:
        """Of every head's tokens: [B, n, H, P, 2]."""
        base, step = self.held.head_base, self.held.head_step
        assert base is not None and step is not None
        return self.rotary.phases(base[layer].double() + self.shift * step[layer])


class Chosen(Part):
    """k of M equally long blocks, picked per layer and take by score, or once for all layers, then frozen.

    `frames` are the first frames of the candidates `blocks`; `device` is where their key sums and the view lie.
    """

    def __init__(
        self, store: Store, rotary: RotaryTable, blocks: Sequence[Rows], frames: Sequence[int], entry: Choose,
        score: Score, device: torch.device,
    ) -> None:  # fmt: skip
        self.store, self.rotary, self.entry, self.score, self.device = store, rotary, entry, score, device
        self.rows = torch.stack([b.rows for b in blocks]).to(store.base.device)  # [M, c]
        self.n = entry.k * self.rows.shape[1]
        self.frames = torch.tensor(frames, dtype=torch.float64, device=device)
        self.starts = None if entry.starts is None else torch.tensor(entry.starts).to(self.frames)
        moved = None if entry.scored_at is None else torch.tensor(entry.scored_at).to(self.frames) - self.frames  # [M]
        if entry.evidence == "keys":
            base, step = (t.to(device) for t in (store.base[self.rows], store.step[self.rows]))  # [M, c, axes]
            position = base if moved is None else base + moved[:, None, None] * step
            self.turn: Tensor | None = rotary.phases(position.flatten(0, 1))
        else:
            self.sums = [b.key_sum for b in blocks if b.key_sum is not None]
            if len(self.sums) < len(blocks):
                raise RuntimeError("blocks are to be chosen by their key sums: let the policy require 'key_sums'")
            # a uniform shift turns a sum of keys as it turns each of them
            step = store.step[self.rows[:, 0]].to(device)
            self.turn = None if moved is None else rotary.phases(moved[:, None] * step)
        self.picked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # layer → blocks [B, k], rows [B, n], phases

    def open(self, layer: int) -> bool:
        return layer not in self.picked

    def settle(self, queries: Mapping[int, Tensor]) -> None:
        """Pick once for all layers, by the sum of the scores of their queries [B, N, H, D]."""
        total = torch.stack([self.scores(layer, q) for layer, q in queries.items()]).sum(0)
        choice = self._pick(total)
        self.picked = dict.fromkeys(range(self.store.k.shape[0]), choice)

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        if layer not in self.picked:
            assert q is not None
            self.picked[layer] = self._pick(self.scores(layer, q))
        _, rows, phases = self.picked[layer]
        if self.store.kernels:
            self.store.show(layer, rows, phases, self.rotary, k, v)
            return
        at = (torch.arange(rows.shape[0], device=rows.device)[:, None], rows)
        self.rotary.rotate(self.store.keys(layer, at, k), phases, out=k)
        self.store.copy_values(layer, at, v)

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """What each candidate is worth to rotated queries [B, N, H, D]: [B, M]."""
        if self.entry.evidence == "keys":
            assert self.turn is not None
            keys = self.store.keys(layer, (slice(None), self.rows.flatten())).to(self.device)
            return self.score(q, self.rotary.rotate(keys, self.turn)).unflatten(1, self.rows.shape).sum(2)
        sums = torch.stack([s[layer] for s in self.sums], 1)  # [B, M, H, D]
        return self.score(q, sums if self.turn is None else self.rotary.rotate(sums, self.turn))

    def _pick(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = scores.topk(self.entry.k, dim=1).indices.sort(1).values  # [B, k], time order
        rows = self.rows[best.to(self.rows.device)].flatten(1)  # [B, n]
        position, step = (t[rows].to(self.device) for t in (self.store.base, self.store.step))  # [B, n, axes]
        if self.starts is not None:
            shift = (self.starts - self.frames[best]).repeat_interleave(self.rows.shape[1], 1)
            position = position + shift[..., None] * step
        return best, rows, self.rotary.phases(position).unsqueeze(2)  # [B, n, 1, P, 2]


class Fusing(Part):
    """Blocks being replaced by their best n tokens per layer and head, chosen while the first forward runs.

    Until `finish`, the survivors are read from where they lie, so that a choice made by spoilt queries can be
    forgotten; then they take over the first n rows.
    """

    def __init__(
        self, store: Store, rotary: RotaryTable, sources: Sequence[Rows], n: int, shift: float, sort: bool,
        score: Score | None, per_frame: int | None = None,
    ) -> None:  # fmt: skip
        self.store, self.rotary, self.shift, self.n, self.score = store, rotary, shift, n, score
        self.sources, self.sort = sources, sort
        self.per_frame = per_frame  # survivors move to so many a frame, from the first token's frame on
        self.rows = torch.cat([s.rows for s in sources])
        self.at = self.rows.to(store.base.device)
        layers, batch, _, heads, _ = store.k.shape
        axes = store.base.shape[1]
        shape = (layers, batch, n, heads, axes)
        base = torch.zeros(shape, dtype=torch.float32, device=store.base.device)
        self.fused = Rows(self.rows[:n], torch.arange(n), base, torch.zeros_like(base))
        self.done: dict[int, Tensor] = {}  # layer → rows of the survivors [B, n, H]
        self.seen = Fused(store, rotary, self.fused, shift)
        self.finished = False

    def open(self, layer: int) -> bool:
        return layer not in self.done

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        if layer not in self.done:
            assert q is not None
            self.resolve(layer, q=q)
        if self.finished:
            self.seen.fill(layer, k, v, None)
            return
        at = self._survivors(layer)
        self.rotary.rotate(self.store.keys(layer, at, k), self.seen.phases(layer), out=k)
        self.store.copy_values(layer, at, v)

    def finish(self) -> None:
        """Every layer has chosen: the survivors take over."""
        at = self.at[: self.n]
        for layer in self.done:
            survivors = self._survivors(layer)
            for kept in self.store.kept:  # bit by bit
                kept[layer][:, at] = kept[layer][survivors]
        self.finished = True

    def resolve(self, layer: int, *, q: Tensor | None = None, keep: Tensor | None = None) -> None:
        """Choose in one layer: `keep` [B, H, n] or, if that is open, the best by the policy's score."""
        base, step = self._positions(layer)  # [B, M, H, axes]
        if keep is None:
            assert q is not None and self.score is not None
            keys = self.store.keys(layer, (slice(None), self.at))  # [B, M, H, D]
            rotated = self.rotary.rotate(keys, self.rotary.phases(base + self.shift * step))
            keep = self.score(q, rotated).topk(self.n, dim=-1).indices  # [B, H, n], best first
        keep = keep.sort(-1).values if self.sort else keep
        index = keep.transpose(1, 2).unsqueeze(-1)  # [B, n, H, 1]
        gather = lambda x: x.gather(1, index.expand(-1, -1, -1, x.shape[-1]))
        assert self.fused.head_base is not None and self.fused.head_step is not None
        time = lambda: (base * step).sum(-1, keepdim=True) / (step * step).sum(-1, keepdim=True)  # [B, n, H, 1]
        first = time()[:, :1]
        base, step = gather(base), gather(step)
        if self.per_frame is not None:
            slot = first + torch.arange(self.n, device=base.device)[:, None, None] // self.per_frame
            base = base + (slot - time()) * step
        self.fused.head_base[layer] = base
        self.fused.head_step[layer] = step
        self.done[layer] = self.at[index[..., 0].contiguous()]  # the layout steers how kernels round

    def _survivors(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the n tokens that a layer keeps of each take and head lie in the store."""
        rows = self.done[layer]
        take = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
        head = torch.arange(rows.shape[2], device=rows.device)
        return take, rows, head

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
