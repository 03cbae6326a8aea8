"""The plan made real: per layer, one contiguous K/V that attention reads, planned history first, then the live tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..attention import attend
from ..errors import LongtakeError, PlanError
from ..plan import COMPRESSED, FULL, Choose, Entry, HistoryShape, Plan, as_tensor
from ..rope import RotaryTable
from .away import Fetched, Staging
from .groups import Group, attend_in_groups, head_groups
from .parts import MANY_PIECES, Chosen, Fill, Fused, Fusing, Part, Plain, Score
from .store import Rows, Store, span

Positions = tuple[Tensor, Tensor]  # base, step [n, axes]


@dataclass
class Live:
    """A chunk in flight: where each of its forms stands, per stream, and what has been written of it."""

    positions: dict[tuple[str, str], Positions]  # (stream, form)
    phases: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    written: set[tuple[str, str]] = field(default_factory=set)
    reopened: bool = False  # it was part of the past before
    # what had been scored, and whose queries were remembered, when it was announced
    scores: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    queries: dict[str, dict[int, Tensor]] = field(default_factory=dict)


class LayerView:
    """What one layer's attention sees in one pass. A host hands it un-rotated queries, keys and values and gets the
    attention output; it holds tensors only, unless a choice is open, a score was asked for or the pass writes."""

    def __init__(
        self, rotary: RotaryTable, phases: Tensor, k: Tensor, v: Tensor, live: slice, bias: Tensor | None,
        prepare: Callable[[Tensor], None] | None, write: Callable[[Tensor, Tensor, Tensor], None] | None,
        observe: Callable[[Tensor, Tensor], None] | None, groups: list[Group] | None = None,
        direct: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.rotary = rotary
        self.groups = groups  # heads that see different keys; None: all see all
        self.phases = phases  # of the live tokens [n, P, 2]
        self.k, self.v = k, v  # [B, history + live, H, D]
        self.k_live, self.v_live = k[:, live], v[:, live]
        self.bias = bias
        self.prepare, self.write, self.observe = prepare, write, observe
        self.direct = direct  # attention that needs no view; what observes wants to see one

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, backend: str | None = None,
        parallel_config: object = None,
    ) -> Tensor:  # fmt: skip
        """q [B, N, Hq, D], k and v [B, N, Hk, D], after any QK norm and before rotation → output [B, N, Hq, D].

        `causal` is for a pass with nothing before it (a text prefix): with a past, the mask has the wrong corner."""
        if causal and self.k.shape[1] != k.shape[1]:
            past = self.k.shape[1] - k.shape[1]
            raise RuntimeError(f"a causal pass of {k.shape[1]} tokens sees {past} before it: it must come first")
        q = self.rotary.rotate(q, self.phases)
        if self.direct is not None and self.observe is None:
            self.put(k, v)
            return self.direct(q)
        if self.prepare is not None:
            self.prepare(q)
        self.put(k, v)
        if self.groups is not None:
            out = attend_in_groups(q, self.k, self.v, self.groups, bias=self.bias, backend=backend)
        else:
            out = attend(
                q, self.k, self.v, bias=self.bias, causal=causal, backend=backend, parallel_config=parallel_config
            )
        if self.observe is not None:
            self.observe(q, self.k)
        return out

    def put(self, k: Tensor, v: Tensor) -> None:
        """Keys and values of the pass alone, for tokens that have no queries; arguments as for `attend`."""
        self.rotary.rotate(k, self.phases, out=self.k_live)
        self.v_live.copy_(v)
        if self.write is not None:
            self.write(k, v, self.k_live)


class Buffers:
    """The memory of the views: one K/V per stream when resident, one shared layer when scratch, none when alias."""

    def __init__(
        self, shape: HistoryShape, streams: Sequence[str], residency: str, rows: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.shape, self.residency, self.dtype, self.device = shape, residency, dtype, device
        self.rows = rows
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        for stream in streams:
            self.of(stream)

    def of(self, stream: str) -> tuple[Tensor, Tensor]:
        """K and V [L or 1, B, rows, H, D] for a stream's view, anew if `rows` has grown."""
        key = stream if self.residency == "resident" else "shared"
        layers = {"resident": self.shape.layers, "scratch": 1, "alias": 0}[self.residency]
        held = self._held.get(key)
        if held is None or held[0].shape[2] < self.rows:
            s = self.shape
            size = (layers, s.batch, self.rows, s.kv_heads, s.head_dim)
            self._held[key] = tuple(torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2))  # type: ignore[assignment]
        return self._held[key]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self._held.values() for t in pair)


class View:
    """One stream's view of its store under the plan in force.

    `live` is the history's own table of chunks in flight, oldest first: ids grow with time.
    """

    def __init__(
        self, stream: str, store: Store, rotary: RotaryTable, buffers: Buffers, live: dict[int, Live],
        score: Score | None, key_sums: bool, query_sums: bool = False, archive: Store | None = None,
        staging: Staging | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.store, self.rotary, self.buffers, self.live = stream, store, rotary, buffers, live
        self.score, self.key_sums, self.query_sums = score, key_sums, query_sums
        self.archive, self.staging = archive, staging  # of forms that lie in host memory
        self.scores: dict[int, Tensor] = {}  # layer → what the policy's score returned at its moment
        # layer → sum of the queries of the last commit pass [B, 1, H, D] fp32, as though its chunk began at frame 0
        self.queries: dict[int, Tensor] = {}
        self.layer_count = buffers.shape.layers
        # A window's rows lie in fewer or more stretches as its ring of slots turns. Copying always as many pieces as
        # were ever needed makes every chunk cost the same operations.
        self._pieces = 1
        self.close()

    @property
    def n(self) -> int:
        """Tokens of history in view."""
        return sum(part.n for part in self.parts)

    def close(self) -> None:
        """The table has changed: nothing is in view until the next plan."""
        self.plan: Plan | None = None
        self.parts: list[Part] = []
        self.choices: list[Chosen] = []
        self.frames: dict[int, int] = {}  # first frame of every block
        self.heads: list[tuple[range, Tensor]] = []  # keys that some heads do not see, and [L, B, H] of those that do
        self.places: dict[int, range] = {}  # where a block's keys stand, of the blocks the plan names outright
        self.bias: Tensor | None = None  # [history + live], if any entry has a log-weight
        self._filled = False
        self._groups: dict[int, list[list[Group]]] = {}  # keys of a window → per layer, heads that see the same of them
        self._fills: dict[int, list[Fill]] = {}  # layer → what fills a scratch view, the same for every pass
        self._stale: set[int] = set()  # live blocks whose tail a pass that does not write has overwritten

    def lay_out(self, plan: Plan, frames: dict[int, int], fusings: dict[int, Fusing]) -> None:
        """Take up a plan: `frames` is the first frame of every block, `fusings` are the plan's, by entry number."""
        self.close()
        self.plan, self.frames = plan, frames
        if self.staging is not None:
            self.staging.clear()
        pending: list[tuple[Tensor, Tensor]] = []  # rows and shifts of adjacent plain entries: one gather for all
        weights: list[tuple[int, float]] = []

        def flush() -> None:
            if pending:
                rows, shift = (torch.cat(column) for column in zip(*pending, strict=True))
                part = Plain(self.store, self.rotary, rows, shift, self._pieces)
                self._pieces = min(MANY_PIECES, max(self._pieces, len(part.pieces)))
                self.parts.append(part)
                pending.clear()

        start = 0
        for number, entry in enumerate(plan.entries):
            part: Part | None = None
            named: tuple[int, ...] = ()
            weight = 0.0
            if isinstance(entry, Entry):
                home = self._home((entry.block, entry.form))
                held, weight, named = home.find((entry.block, entry.form)), entry.log_weight, (entry.block,)
                if held.head_base is not None:
                    part = Fused(self.store, self.rotary, held, entry.shift)
                else:
                    rows = held.rows
                    if entry.tokens is not None and len(entry.tokens) < len(rows):
                        rows = rows[torch.isin(held.tokens, as_tensor(entry.tokens))]
                    n = len(rows)
                if held.head_base is None and home is not self.store:
                    position = home.base[rows] + float(entry.shift) * home.step[rows]
                    part = self._fetched(rows, self.rotary.phases(position.to(self.buffers.device)))
                elif held.head_base is None:
                    pending.append((rows, torch.full((n,), float(entry.shift), dtype=torch.float64)))
            elif isinstance(entry, Choose):
                part = self._chosen(entry)
            else:
                part, named = fusings[number], entry.blocks
            if part is not None:
                flush()
                self.parts.append(part)
                n = part.n
            weights.append((n, weight))
            if isinstance(entry, Entry) and entry.heads is not None:
                self.heads.append((range(start, start + n), entry.heads[self.stream]))
            self.places.update(dict.fromkeys(named, range(start, start + n)))
            start += n
        flush()
        live = sum(self._tokens(block) for block in self.live)
        if any(weight for _, weight in weights):
            values = [torch.full((n,), float(weight)) for n, weight in weights]
            self.bias = torch.cat([*values, torch.zeros(live)]).to(self.buffers.device)
        self.buffers.rows = max(self.buffers.rows, start + live)  # a plan may list a block twice

    def layers(self, block: int, form: str, *, write: bool, history: bool, observe: bool) -> list[LayerView]:
        """See `History.layers`."""
        if self.plan is None:
            raise RuntimeError("no plan is in force: call apply(plan) after admit and commit, before layers")
        if self.buffers.residency == "alias":
            return self._alias(block, form, history, observe)
        live, held = self.live[block], self.store.held[(block, form)]
        before = [b for b in self.live if b < block]
        if history and any((self.stream, FULL) not in self.live[b].written for b in before):
            raise RuntimeError(f"block {block} would see a live block before it that has not been computed yet")
        resident = self.buffers.residency == "resident"
        buffers = self.buffers.of(self.stream)
        if resident:
            self._mend(*buffers, before if history else [])
        start = self.n + sum(self._tokens(b) for b in before)
        first = 0 if history else start
        window, tail = slice(first, start + len(held.rows)), slice(start - first, start - first + len(held.rows))
        bias = None if self.bias is None else self.bias[window]
        observed = self._observed([*before, block], first) if observe else None
        observe = observe and (observed is None or len(observed) > 0)
        groups = self._grouped(window.stop) if self.heads and history else None
        direct = history and not resident and self._direct()
        result = []
        for layer in range(self.layer_count):
            k, v = (t[layer if resident else 0] for t in buffers)
            prepare = None
            if history and not resident:
                prepare = self._scratch_filler(layer, k, v, before)
            elif history and any(part.open(layer) for part in self.parts):
                prepare = partial(self._fill, layer, k, v, only_open=True)
            result.append(
                LayerView(
                    self.rotary, live.phases[(self.stream, form)], k[:, window], v[:, window], tail, bias, prepare,
                    self._writer(layer, held, block, form) if write else None,
                    self._watcher(layer, observe, observed, block if write and form == FULL else None),
                    None if groups is None else groups[layer],
                    self._reader(layer, k, v, before, window.stop) if direct else None,
                )
            )  # fmt: skip
        if write:
            live.written.add((self.stream, form))
        # a quantised store holds something else than what the pass has left in the tail: later blocks see the store
        if write and form == FULL and self.store.form is None:
            self._stale.discard(block)
        else:
            self._stale.add(block)
        return result

    def _tokens(self, block: int) -> int:
        return len(self.store.held[(block, FULL)].rows)

    def _grouped(self, keys: int) -> list[list[Group]]:
        if keys not in self._groups:
            self._groups[keys] = head_groups(self.heads, keys, self.buffers.shape, self.buffers.device)
        return self._groups[keys]

    def _score(self) -> Score:
        score = self.score if self.plan is None or self.plan.score is None else self.plan.score
        if score is None:
            raise RuntimeError("the plan has an open choice, but the policy gave no score")
        return score

    def _home(self, key: tuple[int, str]) -> Store:
        """Where a form of a block lies."""
        return self.archive if self.archive is not None and key in self.archive.held else self.store

    def _fetched(self, rows: Tensor, phases: Tensor) -> Fetched:
        assert self.archive is not None and self.staging is not None
        return Fetched(self.staging, self.archive, self.rotary, rows, phases)

    def _chosen(self, entry: Choose) -> Part:
        home = self._home((entry.candidates[0], entry.form))
        blocks = [home.find((b, entry.form)) for b in entry.candidates]
        frames = [self.frames[b] for b in entry.candidates]
        choice = Chosen(home, self.rotary, blocks, frames, entry, self._score(), self.buffers.device)
        self.choices.append(choice)
        if entry.shared:
            if len(self.queries) < self.layer_count:
                raise PlanError("a choice for all layers needs the last chunk's queries, and none were kept")
            block = max(self.live)  # the one that enters
            step = self._step(block)
            now = float(self.frames[block] + (self.plan.live_shift if self.plan is not None else 0))
            turn = self.rotary.phases(now * step)
            choice.settle({layer: self.rotary.rotate(q, turn) for layer, q in self.queries.items()})
        if home is self.store:
            return choice
        if not entry.shared:
            raise PlanError("a choice among blocks in host memory must be the same for all layers (shared=True)")
        _, rows, phases = choice.picked[0]
        return self._fetched(rows, phases)

    def _step(self, block: int) -> Tensor:
        """Step per frame of shift [1, axes] of a live block, whose tokens all move alike."""
        return self.live[block].positions[(self.stream, FULL)][1][:1].to(self.buffers.device)

    def _mend(self, k: Tensor, v: Tensor, before: list[int]) -> None:
        """Bring a resident view up to date: all of it after a new plan, else the live blocks that a pass left stale."""
        if not self._filled:
            for layer in range(self.layer_count):
                self._fill(layer, k[layer], v[layer], None, only_open=False)
                self._fill_live(layer, k[layer], v[layer], list(self.live))
            self._filled = True
        elif not self._stale.isdisjoint(before):
            for layer in range(self.layer_count):
                self._fill_live(layer, k[layer], v[layer], before)
            self._stale.difference_update(before)

    def _fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None, *, only_open: bool) -> None:
        """Write the open parts of one layer, or the others."""
        start = 0
        for part in self.parts:
            if part.open(layer) == only_open:
                part.fill(layer, k[:, start : start + part.n], v[:, start : start + part.n], q)
            start += part.n

    def _fill_live(self, layer: int, k: Tensor, v: Tensor, blocks: list[int]) -> None:
        """Put written live blocks into the tail."""
        start = self.n
        for block in blocks:
            to = slice(start, start + self._tokens(block))
            if (self.stream, FULL) in self.live[block].written:
                at = (slice(None), span(self.store.held[(block, FULL)].rows))
                phases = self.live[block].phases[(self.stream, FULL)]
                self.rotary.rotate(self.store.keys(layer, at, k[:, to]), phases, out=k[:, to])
                self.store.copy_values(layer, at, v[:, to])
            start = to.stop

    def _scratch_filler(self, layer: int, k: Tensor, v: Tensor, before: list[int]) -> Callable[[Tensor], None]:
        """What builds a layer's view right before its attention. The place is the same until the next plan."""
        if layer not in self._fills:
            ends = list(accumulate((part.n for part in self.parts), initial=0))
            self._fills[layer] = [
                part.bind(layer, k[:, start:end], v[:, start:end])
                for part, (start, end) in zip(self.parts, pairwise(ends), strict=True)
            ]
        fills = self._fills[layer]

        def prepare(q: Tensor) -> None:
            for fill in fills:
                fill(q)
            if before:
                self._fill_live(layer, k, v, before)

        return prepare

    def _direct(self) -> bool:
        """Whether attention can read the store: everything shown is quantised and seen alike by all heads and takes."""
        if not self.store.kernels or self.store.form is None or self.heads or self.bias is not None:
            return False
        return len(self.parts) == 1 and isinstance(self.parts[0], Plain) and self.parts[0].store is self.store

    def _reader(self, layer: int, k: Tensor, v: Tensor, before: list[int], end: int) -> Callable[[Tensor], Tensor]:
        """What attends to the codes of the past and to the tail, which ends at `end`."""
        part, tail = self.parts[0], slice(self.n, end)
        assert isinstance(part, Plain)

        def attend(q: Tensor) -> Tensor:
            if before:
                self._fill_live(layer, k, v, before)
            return self.store.attend(layer, part.rows, part.phases, self.rotary, k[:, tail], v[:, tail], q)

        return attend

    def _turned(self, total: Tensor, block: int, back: int) -> Tensor:
        """A sum [B, 1, H, D] over a live block's rotated tokens, as though the block lay `back` frames earlier than it
        was written; a plan's `live_shift` is taken back too."""
        assert self.plan is not None
        shift = -back - self.plan.live_shift
        return self.rotary.rotate(total, self.rotary.phases(shift * self._step(block))) if shift else total

    def _writer(self, layer: int, held: Rows, block: int, form: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        store, at = self.store, span(held.rows)
        # blocks are chosen among in their compressed form, if they have one
        summed = self.key_sums and (form != FULL or (self.stream, COMPRESSED) not in self.live[block].positions)

        def write(k: Tensor, v: Tensor, rotated: Tensor) -> None:
            store.write(layer, (slice(None), at), k, v)
            if summed:
                if held.key_sum is None:
                    held.key_sum = store.sums.take()
                held.key_sum[layer] = self._turned(rotated.float().sum(1, keepdim=True), block, 0)[:, 0]

        return write

    def _observed(self, live: list[int], first: int) -> Tensor | None:
        """Where the keys of `Plan.observe`, as far as the pass sees them, stand in a window of the view that begins at
        `first`; None: all of them."""
        if self.plan is None or self.plan.observe is None:
            return None
        places, start = dict(self.places), self.n
        for block in live:
            places[block] = range(start, start + self._tokens(block))
            start = places[block].stop
        wanted = {at for b, at in places.items() if b in self.plan.observe and at.start >= first}
        index = [torch.arange(at.start - first, at.stop - first) for at in sorted(wanted, key=lambda at: at.start)]
        return torch.cat(index or [torch.arange(0)]).to(self.buffers.device)

    def _watcher(
        self, layer: int, observe: bool, at: Tensor | None, written: int | None
    ) -> Callable[[Tensor, Tensor], None] | None:
        """What looks at a layer's rotated queries and keys: the policy's score, and the sum of a written block's
        queries where a policy asked for it."""
        score = self._observer(layer, at) if observe else None
        if not self.query_sums or written is None:
            return score
        block = written

        def watch(q: Tensor, k: Tensor) -> None:
            self.queries[layer] = self._turned(q.float().sum(1, keepdim=True), block, self.frames[block])
            if score is not None:
                score(q, k)

        return watch

    def _observer(self, layer: int, at: Tensor | None) -> Callable[[Tensor, Tensor], None]:
        score = self._score()

        def observe(q: Tensor, k: Tensor) -> None:
            self.scores[layer] = score(q, k if at is None else k.index_select(1, at))

        return observe

    def _alias(self, block: int, form: str, history: bool, observe: bool) -> list[LayerView]:
        """The store is the view: legal while everything held is seen, unmoved, and lies in one piece."""
        assert self.plan is not None
        store, live, held = self.store, self.live[block], self.store.held[(block, form)]
        used = int(store.used.sum())
        whole = all(
            isinstance(e, Entry) and e.shift == 0 and e.log_weight == 0 and e.heads is None for e in self.plan.entries
        )
        if len(self.live) > 1:
            raise LongtakeError(
                "residency 'alias' is for takes of one chunk at a time; use residency='resident' or 'scratch'"
            )
        if not whole or self.n + len(held.rows) != used or not bool(store.used[:used].all()):
            raise LongtakeError(
                "residency 'alias' needs a policy that moves and hides nothing; use residency='resident' or 'scratch'"
            )
        at = span(held.rows)
        if not isinstance(at, slice):
            raise LongtakeError("residency 'alias' needs equal chunks; use residency='resident' or 'scratch'")
        live.written.add((self.stream, form))
        window = slice(0, used) if history else at
        tail = slice(at.start - window.start, at.stop - window.start)
        observed = None
        observe = observe and self.plan.observe != ()
        if observe and self.plan.observe is not None:
            observed = torch.cat([store.held[(b, FULL)].rows for b in self.plan.observe]).to(self.buffers.device)
        return [
            LayerView(
                self.rotary, live.phases[(self.stream, form)], store.k[layer][:, window], store.v[layer][:, window],
                tail, None, None, None, self._observer(layer, observed) if observe else None,
            )
            for layer in range(self.layer_count)
        ]  # fmt: skip
