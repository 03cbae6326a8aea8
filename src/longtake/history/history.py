"""The memory of a take.

Life of a chunk:

    id = history.admit(frame, span, positions)     a live block is announced
    history.apply(policy.plan(history.table(), signals))    drops happen, rows are reserved, the view is laid out
    history.layers(stream, id)                      S times: one LayerView per layer; the live tail is rewritten
    history.layers(stream, id, write=True)          the commit pass also stores the un-rotated K/V in the reserved rows
    history.commit(id)                              the block becomes part of the past

The table changes in `apply` and `commit` only, never while layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..plan import (
    FULL,
    Block,
    BlockTable,
    Choose,
    Entry,
    Form,
    Fuse,
    HistoryShape,
    Plan,
    Signals,
    as_tensor,
    difference,
)  # fmt: skip
from ..rope import RotaryTable
from .store import Rows, Store, span
from .view import Chosen, Fused, Fusing, LayerView, Part, Plain, StreamView

RESIDENCIES = ("resident", "scratch", "alias")
Positions = tuple[Tensor, Tensor]  # base, step [n, axes]


@dataclass
class _Live:
    """A chunk in flight: where each of its forms stands, per stream, and what has been written of it."""

    positions: dict[tuple[str, str], Positions]  # (stream, form)
    phases: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    written: set[tuple[str, str]] = field(default_factory=set)
    reopened: bool = False  # it was part of the past before
    scores: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # what had been scored when it was announced


class History:
    """Blocks of one take (or of several in lockstep), their K/V per stream, and the view of the current plan.

    `capacity` and `visible` are tokens, the chunks in flight included; None lets both grow (full history).
    `residency` says where the view lives: "resident" (a second K/V, built once per plan), "scratch" (one layer's worth,
    rebuilt in every forward) or "alias" (the store itself, with rotated keys: only while nothing is ever moved or
    hidden).
    """

    def __init__(
        self, shape: HistoryShape, rotary: RotaryTable, *, streams: tuple[str, ...] = ("cond",),
        capacity: int | None = None, visible: int | None = None, live_tokens: int | None = None,
        residency: str = "resident", score: Callable[[Tensor, Tensor], Tensor] | None = None,
        key_sums: bool = False, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if residency not in RESIDENCIES:
            raise LongtakeError(f"residency {residency!r}: use one of {', '.join(RESIDENCIES)}")
        self.shape, self.rotary, self.residency, self.score, self.key_sums = shape, rotary, residency, score, key_sums
        self.streams = streams
        self.dtype, self.device = dtype, torch.device(device)
        self.fixed = capacity is not None
        live = live_tokens or shape.chunk_tokens
        rows = capacity + shape.anchor_tokens if capacity is not None else 8 * live + shape.anchor_tokens
        self.stores = {s: self._new_store(rows) for s in streams}
        self._view_rows = (visible + shape.anchor_tokens if visible is not None else rows) if self.fixed else rows
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self.blocks: list[Block] = []
        self.frames_seen = 0
        self._next_id = 0
        self._live: dict[int, _Live] = {}
        self._views: dict[str, StreamView] = {}
        self._plan = Plan()
        self._fusing: list[tuple[Fuse, int, dict[str, Fusing]]] = []
        self._scores: dict[str, dict[int, Tensor]] = {stream: {} for stream in streams}
        for stream in streams:
            self._buffer(stream)

    # --- what a policy sees -------------------------------------------------------------------------------------

    def table(self) -> BlockTable:
        self._settle()
        past = tuple(b for b in self.blocks if b.id not in self._live)
        live = tuple(b for b in self.blocks if b.id in self._live)
        return BlockTable(past, live, self.frames_seen)

    def signals(self, chunk: int = 0) -> Signals:
        return Signals(chunk, self._scored())

    # --- the life of a chunk ------------------------------------------------------------------------------------

    def admit(
        self, frame: int, span: int, positions: Positions | Mapping[str, Positions], *, role: str = "live",
        grid: tuple[int, int] = (0, 0), packable: Any = None, structural: Any = range(0),
    ) -> int:  # fmt: skip
        """Announce a chunk of `span` latent frames from `frame` on, its tokens at `positions` (base, step [n, axes]),
        which may differ per stream. Returns the block's id. `role="anchor"` marks what must never be evicted."""
        block = self._next_id
        self._next_id += 1
        per_stream = positions if isinstance(positions, Mapping) else dict.fromkeys(self.streams, positions)
        self._live[block] = _Live({(s, FULL): p for s, p in per_stream.items()}, scores=self._scored())
        tokens = len(per_stream[self.streams[0]][0])
        self.blocks.append(Block(block, role, frame, span, {FULL: Form(tokens)}, grid, packable, structural))
        return block

    def add_form(self, block: int, form: str, positions: Positions | Mapping[str, Positions]) -> None:
        """Reserve rows for another form of a live block, e.g. its compressed tokens; call before `apply`."""
        per_stream = positions if isinstance(positions, Mapping) else dict.fromkeys(self.streams, positions)
        self._live[block].positions.update({(s, form): p for s, p in per_stream.items()})
        at = self._index(block)
        tokens = len(per_stream[self.streams[0]][0])
        self.blocks[at] = replace(self.blocks[at], forms={**self.blocks[at].forms, form: Form(tokens)})

    def apply(self, plan: Plan) -> None:
        """Make a plan true: forget what it drops, fuse what it fuses, reserve rows for new live blocks, lay out the
        view. Blocks it neither lists nor drops stay, unseen."""
        self._settle()
        self._abandon_open()
        for drop in plan.drops:
            self._drop(drop.block, drop.form, drop.tokens)
        fusings = self._fuse(plan)
        self._settle()  # fusings that were told what to keep are done: their rows are free for blocks that enter
        for block, live in self._live.items():
            for (stream, form), (base, step) in live.positions.items():
                if (block, form) not in self.stores[stream].held:
                    self._make_room(len(base))
                    self.stores[stream].take((block, form), base, step)
            live.phases = {
                key: self.rotary.phases(  # in fp64: whole-number positions would meet a float shift in fp32
                    base.to(self.device, torch.float64) + plan.live_shift * step.to(self.device, torch.float64)
                )
                for key, (base, step) in live.positions.items()
            }
        self._plan = plan
        self._views = {stream: self._lay_out(stream, plan, fusings) for stream in self.streams}

    def layers(
        self, stream: str, block: int, *, form: str = FULL, write: bool = False, history: bool = True,
        observe: bool = False,
    ) -> list[LayerView]:  # fmt: skip
        """One LayerView per layer for a pass of `block`, which sees the planned history (unless `history` is off), the
        live blocks before it, and itself. `write` stores its K/V; `observe` calls the policy's score.

        Where several passes of a block share its K/V, let the one that writes be the last: after any other, the
        resident view is mended from the store before a later live block looks at it."""
        if stream not in self._views:
            raise RuntimeError("no plan is in force: call apply(plan) after admit and commit, before layers")
        live, view, store = self._live[block], self._views[stream], self.stores[stream]
        held = store.held[(block, form)]
        tokens = len(held.rows)
        if self.residency == "alias":
            return self._alias(stream, block, form, history, observe)
        before = [b for b in self._live if b < block]  # ids grow with time
        if history and any((stream, FULL) not in self._live[b].written for b in before):
            raise RuntimeError(f"block {block} would see a live block before it that has not been computed yet")
        start = view.n + sum(len(store.held[(b, FULL)].rows) for b in before)
        if self.residency == "resident" and not view.filled:
            self._fill_resident(stream, view)
        elif self.residency == "resident" and history and not view.stale.isdisjoint(before):
            for layer in range(self.shape.layers):
                self._fill_live(stream, view, layer, view.k[layer], view.v[layer], before)
            view.stale.difference_update(before)
        first = 0 if history else start
        window, tail = slice(first, start + tokens), slice(start - first, start - first + tokens)
        bias = None if view.bias is None else view.bias[window]
        observed = self._observed(stream, view, [*before, block], first) if observe else None
        result = []
        for layer in range(self.shape.layers):
            at = layer if self.residency == "resident" else 0
            k, v = view.k[at], view.v[at]
            prepare = None
            if history and self.residency == "scratch":
                prepare = self._filler(stream, view, layer, k, v, before, None)
            elif history and any(part.open(layer) for part in view.parts):
                prepare = self._filler(stream, view, layer, k, v, [], True)
            result.append(
                LayerView(
                    self.rotary, live.phases[(stream, form)], k[:, window], v[:, window], tail, bias, prepare,
                    self._writer(store, layer, held) if write else None,
                    self._observer(stream, layer, observed) if observe else None,
                )
            )  # fmt: skip
        if write:
            live.written.add((stream, form))
        if write and form == FULL:
            view.stale.discard(block)
        else:
            view.stale.add(block)
        return result

    def commit(self, block: int) -> None:
        """The chunk becomes part of the past; its role changes, nothing is copied."""
        live = self._live[block]
        missing = [key for key in live.positions if key not in live.written]
        if missing:
            raise RuntimeError(f"block {block} is committed before its K/V were written for {missing}")
        self._settle()
        del self._live[block]
        at = self._index(block)
        role = "anchor" if self.blocks[at].role == "anchor" else "committed"
        self.blocks[at] = replace(self.blocks[at], role=role)
        self.frames_seen += 0 if live.reopened else self.blocks[at].span
        self._views = {}

    def reopen(self, block: int) -> BlockTable:
        """Make a committed block live again, so that a pass can write its K/V anew where they lie (prompt recache).
        Returns the table as it was when the block was in flight, of what is still held: plan over that, without its
        drops. Only a whole block can be reopened."""
        at = self._index(block)
        old = self.blocks[at]
        if self._live or not old.complete:
            raise RuntimeError(f"block {block} cannot be written anew: it has lost tokens, or a chunk is in flight")
        positions = {}
        for stream, store in self.stores.items():
            rows = store.held[(block, FULL)].rows.to(store.base.device)
            positions[(stream, FULL)] = (store.base[rows], store.step[rows])
        self._live[block] = _Live(positions, reopened=True, scores=self._scored())
        self.blocks[at] = replace(old, role="anchor" if old.role == "anchor" else "live")
        self._views = {}
        return BlockTable(tuple(b for b in self.blocks[:at]), (self.blocks[at],), old.frame)

    def abandon(self, block: int) -> None:
        """Forget a chunk in flight and what was scored with it. What its plan dropped or fused stays so: the same plan
        follows from the table that is left. A reopened block goes back to the past with what was written of it."""
        live = self._live.pop(block)
        self._scores = live.scores
        if live.reopened:
            at = self._index(block)
            self.blocks[at] = replace(self.blocks[at], role="committed" if self.blocks[at].role == "live" else "anchor")
            self._views = {}
            return
        for store in self.stores.values():
            for key in [key for key in store.held if key[0] == block]:
                store.drop(key)
        del self.blocks[self._index(block)]
        self._views = {}

    @property
    def fusing(self) -> bool:
        """Whether a fusing has begun and not all layers and streams have had their forward."""
        self._settle()
        return any(part.done for _, _, per_stream in self._fusing for part in per_stream.values())

    # --- bytes --------------------------------------------------------------------------------------------------

    def attended(self, stream: str | None = None) -> int:
        """Tokens of history in the current view."""
        view = self._views.get(stream or self.streams[0])
        return view.n if view else 0

    def memory(self) -> dict[str, int]:
        """Bytes held between chunks: the store of every stream, and the view."""
        return {
            "store": sum(store.nbytes for store in self.stores.values()),
            "view": sum({id(k): k.nbytes + v.nbytes for k, v in self._buffers.values()}.values()),
        }

    @property
    def held_bytes(self) -> int:
        """Bytes of K/V rows in use, of what the store has room for."""
        used = sum(int(store.used.sum()) for store in self.stores.values())
        return used * self.shape.token_bytes // self.shape.streams

    # --- within -------------------------------------------------------------------------------------------------

    def _scored(self) -> dict[str, dict[int, Tensor]]:
        return {stream: dict(scores) for stream, scores in self._scores.items()}

    def _index(self, block: int) -> int:
        return next(i for i, b in enumerate(self.blocks) if b.id == block)

    def _new_store(self, rows: int) -> Store:
        s = self.shape
        return Store(s.layers, s.batch, rows, s.kv_heads, s.head_dim, self.rotary.axes, self.dtype, self.device)

    def _buffer(self, stream: str) -> tuple[Tensor, Tensor]:
        """The view's memory: per stream when resident, one shared layer when scratch, none when alias."""
        key = stream if self.residency == "resident" else "scratch"
        layers = {"resident": self.shape.layers, "scratch": 1, "alias": 0}[self.residency]
        held = self._buffers.get(key)
        if held is None or held[0].shape[2] < self._view_rows:
            s = self.shape
            size = (layers, s.batch, self._view_rows, s.kv_heads, s.head_dim)
            k, v = (torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2))
            self._buffers[key] = (k, v)
        return self._buffers[key]

    def _make_room(self, tokens: int) -> None:
        if self.fixed:
            return
        for store in self.stores.values():
            used = int(store.used.sum())
            if used + tokens > store.size:
                store.grow(max(used + tokens, store.size + store.size // 2))
                self._view_rows = store.size

    def _drop(self, block: int, form: str, tokens: Any) -> None:
        gone = None if tokens is None else as_tensor(tokens)
        for store in self.stores.values():
            store.drop((block, form), gone)
        at = self._index(block)
        entry = self.blocks[at]
        forms = dict(entry.forms)
        left = None if tokens is None else difference(forms[form].owned, tokens)
        if left is None or not len(left):
            del forms[form]
        else:
            forms[form] = replace(forms[form], kept=left)
        if forms:
            self.blocks[at] = replace(entry, forms=forms)
        else:
            del self.blocks[at]

    def _fuse(self, plan: Plan) -> dict[int, dict[str, Fusing]]:
        """Begin what the plan fuses, by entry number and stream; where the tokens to keep are given, it is done here.

        What the plan before left open and some stream has begun goes on: streams need not compute in step."""
        fusings: dict[int, dict[str, Fusing]] = {}
        for at, fuse in enumerate(plan.entries):
            if not isinstance(fuse, Fuse):
                continue
            if begun := next((f for f in self._fusing if _same(f[0], fuse)), None):
                fusings[at] = begun[2]
                continue
            score = self._score() if fuse.keep is None else None
            for stream, store in self.stores.items():
                sources = [store.held[(b, FULL)] for b in fuse.blocks]
                part = Fusing(store, self.rotary, sources, fuse.n, fuse.shift, fuse.sort, score)
                keep = fuse.keep[stream] if isinstance(fuse.keep, Mapping) else fuse.keep
                if keep is not None:
                    for layer in range(self.shape.layers):
                        part.resolve(layer, keep=keep[layer].to(self.device))
                fusings.setdefault(at, {})[stream] = part
            self._fusing.append((fuse, self._next_id, fusings[at]))
            self._next_id += 1
        if len(self._fusing) > len(fusings):
            raise RuntimeError("a plan drops a fusing that one stream has begun and another has not: repeat it")
        return fusings

    def _lay_out(self, stream: str, plan: Plan, fusings: dict[int, dict[str, Fusing]]) -> StreamView:
        store, weights = self.stores[stream], []
        parts: list[Part] = []
        places: dict[int, range] = {}
        at_token = 0
        pending: list[tuple[Tensor, Tensor]] = []  # rows and shifts of adjacent plain entries: one gather for all

        def flush() -> None:
            if pending:
                rows, shift = (torch.cat(column) for column in zip(*pending, strict=True))
                parts.append(Plain(store, self.rotary, rows, shift))
                pending.clear()

        for at, entry in enumerate(plan.entries):
            part: Part | None = None
            if isinstance(entry, Entry):
                held = store.held[(entry.block, entry.form)]
                if held.head_base is None:
                    rows = held.rows
                    if entry.tokens is not None and len(entry.tokens) < len(rows):
                        rows = rows[torch.isin(held.tokens, as_tensor(entry.tokens))]
                    pending.append((rows, torch.full((len(rows),), float(entry.shift), dtype=torch.float64)))
                    weights.append((len(rows), entry.log_weight))
                    places[entry.block] = range(at_token, at_token + len(rows))
                    at_token += len(rows)
                    continue
                part = Fused(store, self.rotary, held, entry.shift)
                places[entry.block] = range(at_token, at_token + part.n)
            elif isinstance(entry, Choose):
                candidates = [store.held[(b, entry.form)] for b in entry.candidates]
                frames = [self.blocks[self._index(b)].frame for b in entry.candidates]
                part = Chosen(store, self.rotary, candidates, frames, entry.k, entry.starts, self._score())
            else:
                part = fusings[at][stream]
                places.update(dict.fromkeys(entry.blocks, range(at_token, at_token + part.n)))
            flush()
            parts.append(part)
            at_token += part.n
            weights.append((part.n, getattr(entry, "log_weight", 0.0)))
        flush()
        live = sum(len(store.held[(b, FULL)].rows) for b in self._live)
        bias = None
        if any(weight for _, weight in weights):
            values = [torch.full((n,), float(weight)) for n, weight in weights]
            bias = torch.cat([*values, torch.zeros(live)]).to(self.device)
        need = sum(part.n for part in parts) + live
        if need > self._view_rows:  # a plan that lists a block twice, or full history
            self._view_rows = need if self.fixed else max(need, store.size)
        k, v = self._buffer(stream)
        return StreamView(parts, places, k, v, bias)

    def _score(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self.score is None:
            raise RuntimeError("the plan has an open choice, but the policy gave no score")
        return self.score

    def _fill_resident(self, stream: str, view: StreamView) -> None:
        for layer in range(self.shape.layers):
            view.fill(layer, view.k[layer], view.v[layer], None, only_open=False)
            self._fill_live(stream, view, layer, view.k[layer], view.v[layer], list(self._live))
        view.filled = True

    def _fill_live(self, stream: str, view: StreamView, layer: int, k: Tensor, v: Tensor, blocks: list[int]) -> None:
        """Put written live blocks back into the tail after the view has been laid out anew."""
        store, start = self.stores[stream], view.n
        for block in blocks:
            held = store.held[(block, FULL)]
            to = slice(start, start + len(held.rows))
            if (stream, FULL) in self._live[block].written:
                at = span(held.rows)
                self.rotary.rotate(store.k[layer][:, at], self._live[block].phases[(stream, FULL)], out=k[:, to])
                v[:, to].copy_(store.v[layer][:, at])
            start = to.stop

    def _filler(
        self, stream: str, view: StreamView, layer: int, k: Tensor, v: Tensor, live: list[int], only_open: bool | None
    ) -> Callable[[Tensor], None]:
        def prepare(q: Tensor) -> None:
            view.fill(layer, k, v, q, only_open)
            if live:
                self._fill_live(stream, view, layer, k, v, live)

        return prepare

    def _writer(self, store: Store, layer: int, held: Rows) -> Callable[[Tensor, Tensor, Tensor], None]:
        at = span(held.rows)

        def write(k: Tensor, v: Tensor, rotated: Tensor) -> None:
            store.k[layer][:, at] = k.to(store.k.dtype)
            store.v[layer][:, at] = v.to(store.v.dtype)
            if self.key_sums:
                if held.key_sum is None:
                    s = self.shape
                    held.key_sum = rotated.new_zeros(s.layers, s.batch, s.kv_heads, s.head_dim, dtype=torch.float32)
                held.key_sum[layer] = rotated.float().sum(1)

        return write

    def _observed(self, stream: str, view: StreamView, live: list[int], first: int) -> Tensor | None:
        """Where the keys of `Plan.observe`, as far as the pass sees them, stand in a window of the view that begins at
        `first`; None: all of them."""
        wanted = self._plan.observe
        if wanted is None:
            return None
        places, start = dict(view.places), view.n
        for block in live:
            places[block] = range(start, start + len(self.stores[stream].held[(block, FULL)].rows))
            start = places[block].stop
        seen = sorted({at for b, at in places.items() if b in wanted and at.start >= first}, key=lambda at: at.start)
        index = [torch.arange(at.start - first, at.stop - first) for at in seen]
        return torch.cat(index or [torch.arange(0)]).to(self.device)

    def _observer(self, stream: str, layer: int, at: Tensor | None) -> Callable[[Tensor, Tensor], None]:
        score = self._score()

        def observe(q: Tensor, k: Tensor) -> None:
            self._scores[stream][layer] = score(q, k if at is None else k.index_select(1, at))

        return observe

    def _alias(self, stream: str, block: int, form: str, history: bool, observe: bool) -> list[LayerView]:
        """The store is the view: legal while everything held is seen, unmoved, and lies in one piece."""
        store, live, view = self.stores[stream], self._live[block], self._views[stream]
        held = store.held[(block, form)]
        used = int(store.used.sum())
        entries = self._plan.entries
        whole = all(isinstance(e, Entry) and e.shift == 0 and e.log_weight == 0 for e in entries)
        if not whole or len(self._live) > 1 or view.n + len(held.rows) != used or not bool(store.used[:used].all()):
            raise LongtakeError(
                "residency 'alias' needs a policy that moves and hides nothing; use residency='resident' or 'scratch'"
            )
        at = span(held.rows)
        if not isinstance(at, slice):
            raise LongtakeError("residency 'alias' needs equal chunks; use residency='resident' or 'scratch'")
        live.written.add((stream, form))
        window = slice(0, used) if history else at
        observed = None
        if observe and self._plan.observe is not None:
            observed = torch.cat([store.held[(b, FULL)].rows for b in self._plan.observe]).to(self.device)
        tail = slice(at.start - window.start, at.stop - window.start)
        return [
            LayerView(
                self.rotary, live.phases[(stream, form)], store.k[layer][:, window], store.v[layer][:, window], tail,
                None, None, None, self._observer(stream, layer, observed) if observe else None,
            )
            for layer in range(self.shape.layers)
        ]  # fmt: skip

    def _settle(self) -> None:
        """Let finished fusings become blocks: the one change of the table that a forward prepares."""
        layers = self.shape.layers
        for fuse, new, per_stream in list(self._fusing):
            if any(len(f.done) < layers for f in per_stream.values()):
                continue
            olds = [self.blocks[self._index(b)] for b in fuse.blocks]
            for stream, fusing in per_stream.items():
                store = self.stores[stream]
                for block in fuse.blocks:
                    del store.held[(block, FULL)]
                store.used[fusing.rows[fuse.n :]] = False
                store.held[(new, FULL)] = fusing.fused
            at = self._index(fuse.blocks[0])
            self.blocks[at] = Block(
                new, "fused", olds[0].frame, sum(b.span for b in olds), {FULL: Form(fuse.n)}, olds[0].grid
            )
            self.blocks = [b for b in self.blocks if b.id not in fuse.blocks]
            self._fusing.remove((fuse, new, per_stream))

    def _abandon_open(self) -> None:
        """Forget the fusings that no forward has begun; there is nothing to undo."""
        self._fusing = [f for f in self._fusing if any(part.done for part in f[2].values())]


def _same(a: Fuse, b: Fuse) -> bool:
    """Whether two open fusings ask for the same."""
    return a.keep is b.keep is None and (a.blocks, a.n, a.sort, a.shift) == (b.blocks, b.n, b.sort, b.shift)
