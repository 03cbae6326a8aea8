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

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels as triton_kernels
from ..errors import LongtakeError, PlanError
from ..plan import FULL, Block, BlockTable, Drop, Form, Fuse, HistoryShape, Plan, Signals, as_tensor, difference
from ..rope import RotaryTable
from .away import Staging
from .parts import Fusing, Score
from .quantised import storage_form
from .store import Store, Sums
from .view import Buffers, LayerView, Live, Positions, View

RESIDENCIES = ("resident", "scratch", "alias")


@contextlib.contextmanager
def _told_in_one_line(rows: int) -> Iterator[None]:
    """A history of `rows` tokens that host memory has no room for is the user's to change. What a device says of its
    own memory stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise LongtakeError(
            f"a history of {rows} tokens is more memory than this machine gives: let the policy hold less (a smaller "
            "archive, fewer frames), or make a smaller picture"
        ) from error


class History:
    """Blocks of one take (or of several in lockstep), their K/V per stream, and the view of the current plan.

    `capacity` and `visible` are tokens, the chunks in flight included; None lets both grow (full history).
    `residency` says where the view lives: "resident" (a second K/V, built once per plan), "scratch" (one layer's worth,
    rebuilt in every forward) or "alias" (the store itself, with rotated keys: only while nothing is ever moved or
    hidden).
    `offloaded` is how many tokens may lie in host memory besides, and how many of those a plan shows at most;
    `summed` how many forms have key sums at once. `history_dtype` "int8" or "fp8" keeps the past quantised; what is in
    view, the chunk in flight included, is of `dtype`. `kernels="triton"` builds the view with Triton; where the past is
    quantised and the view "scratch", attention then reads the codes, and no view is built.
    """

    def __init__(
        self, shape: HistoryShape, rotary: RotaryTable, *, streams: tuple[str, ...] = ("cond",),
        capacity: int | None = None, visible: int | None = None, live_tokens: int | None = None,
        residency: str = "resident", score: Score | None = None, offloaded: tuple[int, int] = (0, 0),
        key_sums: bool = False, summed: int = 0, query_sums: bool = False, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", history_dtype: str | None = None,
        kernels: str | None = None,
    ) -> None:  # fmt: skip
        if residency not in RESIDENCIES:
            raise LongtakeError(f"residency {residency!r}: use one of {', '.join(RESIDENCIES)}")
        self.form = storage_form(history_dtype)
        if residency == "alias" and self.form is not None:
            raise LongtakeError(
                f"residency 'alias' reads the store itself, which history_dtype={history_dtype!r} keeps as codes: use "
                "residency='scratch' or 'resident'"
            )
        self.shape, self.rotary, self.residency, self.score = shape, rotary, residency, score
        self.streams = streams
        self.dtype, self.device = dtype, torch.device(device)
        self.kernels = triton_kernels.check(kernels, self.device, history_dtype)
        self.fixed = capacity is not None
        live = live_tokens or shape.chunk_tokens
        rows = capacity + shape.anchor_tokens if capacity is not None else 8 * live + shape.anchor_tokens
        sums = (shape.layers, shape.batch, shape.kv_heads, shape.head_dim)
        away, shown_away = offloaded
        shown = visible + shape.anchor_tokens if self.fixed and visible is not None else rows
        with _told_in_one_line(rows + away):
            self.sums = {s: Sums(summed, sums, self.device) for s in streams}
            self.stores = {s: self._new_store(rows, s) for s in streams}
            self.buffers = Buffers(shape, streams, residency, shown, dtype, self.device)
            self.archives = {s: self._new_store(away, s, host=True) for s in streams} if away else {}
            self.staging = {s: Staging(shape, shown_away, dtype, self.device, self.form) for s in self.archives}
        self.blocks: list[Block] = []
        self.frames_seen = 0
        self._next_id = 0
        # called with (stream, block, write, layers) of every pass; may add to what the layers' `observe` looks at
        self.probe: Callable[[str, int, bool, list[LayerView]], None] | None = None
        self._live: dict[int, Live] = {}
        self._fusing: list[tuple[Fuse, int, dict[str, Fusing]]] = []
        self.views = {
            s: View(
                s, store, rotary, self.buffers, self._live, score, key_sums, query_sums, self.archives.get(s),
                self.staging.get(s),
            )
            for s, store in self.stores.items()
        }  # fmt: skip

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
        self._live[block] = Live(
            {(s, FULL): p for s, p in per_stream.items()}, scores=self._scored(), queries=self._queries()
        )
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
        for block, form in plan.away:
            if not self.archives:
                raise PlanError("forms are to move to host memory: let offloaded() say how many tokens")
            for stream, store in self.stores.items():
                if (block, form) in store.held:
                    store.send((block, form), self.archives[stream])
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
        frames = {block.id: block.frame for block in self.blocks}
        for stream, view in self.views.items():
            view.lay_out(plan, frames, {entry: parts[stream] for entry, parts in fusings.items()})

    def layers(
        self, stream: str, block: int, *, form: str = FULL, write: bool = False, history: bool = True,
        observe: bool = False,
    ) -> list[LayerView]:  # fmt: skip
        """One LayerView per layer for a pass of `block`, which sees the planned history (unless `history` is off), the
        live blocks before it, and itself. `write` stores its K/V; `observe` calls the policy's score.

        Where several passes of a block share its K/V, let the one that writes be the last: after any other, the
        resident view is mended from the store before a later live block looks at it."""
        layers = self.views[stream].layers(block, form, write=write, history=history, observe=observe)
        if self.probe is not None:
            self.probe(stream, block, write, layers)
        return layers

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
        self._close_views()

    def reopen(self, block: int) -> BlockTable:
        """Make a committed block live again, so that a pass can write its K/V anew where they lie (prompt recache).
        Returns the table as it was when the block was in flight, of what is still held: plan over that, without its
        drops. Only a whole block can be reopened; chunks in flight stay as they are, after it."""
        at = self._index(block)
        old = self.blocks[at]
        if any(live.reopened for live in self._live.values()) or not self.rewritable(old):
            raise RuntimeError(f"block {block} cannot be written anew: it has lost tokens, or another is being written")
        positions = {}
        for stream, store in self.stores.items():
            for form in old.forms:
                rows = store.held[(block, form)].rows.to(store.base.device)
                positions[(stream, form)] = (store.base[rows], store.step[rows])
        self._live[block] = Live(positions, reopened=True, scores=self._scored(), queries=self._queries())
        for later in [b for b in self._live if b > block]:  # oldest first
            self._live[later] = self._live.pop(later)
        self.blocks[at] = replace(old, role="anchor" if old.role == "anchor" else "live")
        self._close_views()
        return BlockTable(tuple(b for b in self.blocks[:at]), (self.blocks[at],), old.frame)

    def rewritable(self, block: Block) -> bool:
        """Whether a block can be reopened: nothing of it is lost, or lies in host memory."""
        return block.complete and all((block.id, form) in self.stores[self.streams[0]].held for form in block.forms)

    def forget(self, drops: Iterable[Drop]) -> None:
        """Forget forms or tokens for ever, between two chunks."""
        if self._live or self.fusing:
            raise RuntimeError("only between two chunks can the history be told to forget")
        self._abandon_open()
        for drop in drops:
            self._drop(drop.block, drop.form, drop.tokens)
        self._close_views()

    def chosen(self, stream: str | None = None) -> list[dict[int, tuple[tuple[int, ...], Tensor]]]:
        """What the plan's open choices have come to so far: for each of them, by layer, the candidates' ids and the
        places [B, k] of the picked ones among them."""
        choices = self.views[stream or self.streams[0]].choices
        return [{layer: (c.entry.candidates, picked[0]) for layer, picked in c.picked.items()} for c in choices]

    def abandon(self, block: int) -> None:
        """Forget a chunk in flight, what was scored with it, and what its queries chose to fuse. What its plan dropped
        or fused by itself stays so: the same plan follows from the table that is left. A reopened block goes back to
        the past with what was written of it."""
        live = self._live.pop(block)
        if not self._live:
            self._fusing = []
        for stream, view in self.views.items():
            view.scores, view.queries = live.scores[stream], live.queries[stream]
        if live.reopened:
            at = self._index(block)
            self.blocks[at] = replace(self.blocks[at], role="committed" if self.blocks[at].role == "live" else "anchor")
            self._close_views()
            return
        for store in self.stores.values():
            for key in [key for key in store.held if key[0] == block]:
                store.drop(key)
        del self.blocks[self._index(block)]
        self._close_views()

    def clear(self) -> None:
        """Forget everything; the memory stays. A take made in windows begins each of them so."""
        for store in (*self.stores.values(), *self.archives.values()):
            store.held.clear()
            store.used[:] = False
        self._live.clear()
        self.blocks, self._fusing, self.frames_seen = [], [], 0
        for view in self.views.values():
            view.scores, view.queries = {}, {}
        self._close_views()

    @property
    def fusing(self) -> bool:
        """Whether a fusing has begun and not all layers and streams have had their forward."""
        self._settle()
        return any(part.done for _, _, per_stream in self._fusing for part in per_stream.values())

    # --- bytes --------------------------------------------------------------------------------------------------

    def attended(self, stream: str | None = None) -> int:
        """Tokens of history in the current view."""
        return self.views[stream or self.streams[0]].n

    def memory(self) -> dict[str, int]:
        """Bytes held between chunks: the store of every stream, with what was scored and remembered of queries; the
        view, with what it fetches into; and the archive in host memory, if there is one."""
        kept = [t for view in self.views.values() for t in (*view.scores.values(), *view.queries.values())]
        parts = {
            "store": sum(s.nbytes for s in self.stores.values())
            + sum(s.nbytes for s in self.sums.values())
            + sum(t.nbytes for t in kept),
            "view": self.buffers.nbytes + sum(staging.nbytes for staging in self.staging.values()),
        }
        if self.archives:
            parts["archive"] = sum(archive.nbytes for archive in self.archives.values())
        return parts

    @property
    def held_bytes(self) -> int:
        """Bytes of K/V rows in use, of what the store has room for."""
        used = sum(int(store.used.sum()) for store in self.stores.values())
        return used * self.shape.token_bytes // self.shape.streams

    # --- within -------------------------------------------------------------------------------------------------

    def _queries(self) -> dict[str, dict[int, Tensor]]:
        return {stream: dict(view.queries) for stream, view in self.views.items()}

    def _scored(self) -> dict[str, dict[int, Tensor]]:
        return {stream: dict(view.scores) for stream, view in self.views.items()}

    def _close_views(self) -> None:
        for view in self.views.values():
            view.close()

    def _index(self, block: int) -> int:
        return next(i for i, b in enumerate(self.blocks) if b.id == block)

    def _new_store(self, rows: int, stream: str, host: bool = False) -> Store:
        s = self.shape
        device = torch.device("cpu") if host else self.device
        pinned = host and self.device.type == "cuda"  # copies can overlap with the forwards only from pinned memory
        return Store(
            s.layers, s.batch, rows, s.kv_heads, s.head_dim, self.rotary.axes, self.dtype, device, pinned,
            self.sums[stream], self.form, self.kernels and not host,
        )  # fmt: skip

    def reserve(self, tokens: int) -> None:
        """Room for so many more tokens, for good: a prompt that lies in the history has become longer."""
        if self.fixed:
            for store in self.stores.values():
                store.grow(store.size + tokens)
            self.buffers.rows += tokens

    def _make_room(self, tokens: int) -> None:
        if self.fixed:
            return
        for store in self.stores.values():
            used = int(store.used.sum())
            if used + tokens > store.size:
                store.grow(max(used + tokens, store.size + store.size // 2))
                self.buffers.rows = max(self.buffers.rows, store.size)

    def _drop(self, block: int, form: str, tokens: Any) -> None:
        gone = None if tokens is None else as_tensor(tokens)
        for stream, store in self.stores.items():
            archive = self.archives.get(stream)
            home = archive if archive is not None and (block, form) in archive.held else store
            home.drop((block, form), gone)
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
            score = plan.score or self.score
            if fuse.keep is None and score is None:
                raise RuntimeError("the plan has an open fusing, but the policy gave no score")
            for stream, store in self.stores.items():
                sources = [store.find((b, FULL)) for b in fuse.blocks]
                part = Fusing(store, self.rotary, sources, fuse.n, fuse.shift, fuse.sort, score, fuse.per_frame)
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

    def _settle(self) -> None:
        """Let finished fusings become blocks: the one change of the table that a forward prepares."""
        layers = self.shape.layers
        for fuse, new, per_stream in list(self._fusing):
            if any(len(f.done) < layers for f in per_stream.values()):
                continue
            for fusing in per_stream.values():
                fusing.finish()
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
    asked = lambda f: (f.blocks, f.n, f.sort, f.shift, f.per_frame)
    return a.keep is b.keep is None and asked(a) == asked(b)
