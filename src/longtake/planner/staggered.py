"""A staggered take without a model: which chunk takes which step in which row, and how many keys its forward sees.

The order is the staggered sampler's: chunk c enters `lag` rows after the one before; in a row every chunk in flight
takes its step, oldest first, and sees what the policy shows of the past, the chunks in flight before it, and itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..flops import Flops
from ..plan import FULL, Block, BlockTable, Entry, Form, Fuse, HistoryShape, Plan, Signals
from ..policies import KVPolicy, KVRange
from .anatomy import Forward
from .walk import drop_tokens, seen_tokens


@dataclass
class Tally:
    """FLOPs of a take by what they are spent on, "skipped" ones apart, and how many forwards that are."""

    spent: dict[str, Flops] = field(default_factory=dict)
    forwards: int = 0
    reused: int = 0
    held: int = 0  # most tokens held at once
    forwards_made: list[Forward] = field(default_factory=list)  # one by one, in order

    def add(self, kind: str, made: Sequence[Flops], reused: bool = False) -> None:
        """Forwards of one kind, or forwards that are reused instead."""
        kind = "skipped" if reused else kind
        self.spent[kind] = sum(made, self.spent.get(kind, Flops()))
        self.reused += len(made) if reused else 0
        self.forwards += 0 if reused else len(made)

    @property
    def total(self) -> Flops:
        return sum((flops for kind, flops in self.spent.items() if kind != "skipped"), Flops())

    @property
    def skipped(self) -> Flops:
        return self.spent.get("skipped", Flops())

    def as_dict(self) -> dict[str, Any]:
        parts = {kind: flops.as_dict() for kind, flops in self.spent.items()}
        return {**parts, "total": self.total.as_dict(), "forwards": self.forwards, "reused": self.reused}


@dataclass(frozen=True)
class Visit:
    """One forward of a chunk, or a step that is reused instead."""

    chunk: int
    step: int  # `steps`: the pass over its clean latents; −1: of given ones
    tokens: int
    keys: int  # seen, its own among them
    oldest: bool  # nothing in flight is before it
    reused: bool = False


@dataclass
class Walk:
    """`spans` latent frames per chunk, after `given` ones; `commit` as in `HostConfig`.

    `skipped` are the steps that every chunk reuses. `rereads_last` says whether the last chunk of the take gets a pass
    over its clean latents too. `lingers`: a finished chunk stays in flight for one more row, whose first forward is
    that pass (MAGI-1's base model). `held` is the most tokens held at once so far.
    """

    policy: KVPolicy
    shape: HistoryShape
    spans: Sequence[int]
    steps: int
    lag: int
    commit: str = "clean"
    given: int = 0
    skipped: Collection[int] = ()
    rereads_last: bool = True
    lingers: bool = False
    held: int = 0
    blocks: list[Block] = field(default_factory=list)
    live: list[Block] = field(default_factory=list)
    plan: Plan | None = None
    shown: int = 0  # tokens of the past that the plan shows

    def visits(self) -> Iterator[Visit]:
        """Every forward, in order. Raises LongtakeError for a policy whose plans depend on more than token counts."""
        self.policy = self.policy.settle(self.shape)
        self.policy.check(self.shape)
        frame, scores = self.given, Signals()
        starts = [chunk * min(self.lag, self.steps) for chunk in range(len(self.spans))]
        if self.given:
            block = self._block(-1, 0, self.given)
            self.live.append(block)
            yield Visit(-1, -1, self._tokens(block), self._keys(block, scores, self.steps), True)
            self._commit(block)
        entered = 0
        for row in range(starts[-1] + self.steps if starts else 0):
            while entered < len(self.spans) and starts[entered] <= row:
                self.live.append(self._block(entered, frame, self.spans[entered]))
                frame += self.spans[entered]
                entered, self.plan = entered + 1, None
            finished = [block for block in self.live if row - starts[block.id] == self.steps]
            for block in finished:
                yield Visit(block.id, self.steps, self._tokens(block), self._keys(block, scores, self.steps), True)
            denoised = self.live[len(finished) :]
            for block in denoised:
                step = row - starts[block.id]
                reused = step in self.skipped
                keys = self._keys(block, scores, step)
                yield Visit(block.id, step, self._tokens(block), keys, block is self.live[0], reused)
                if not reused:
                    scores = self._scores(scores)
                if step == self.steps - 1 and self.commit == "adopt":
                    self._commit(block)
            for block in finished:
                self._commit(block)
            for block in [b for b in self.live if row - starts[b.id] == self.steps - 1 and not self.lingers]:
                if self.rereads_last or block.id < len(self.spans) - 1:
                    keys = self._keys(block, scores, self.steps)
                    yield Visit(block.id, self.steps, self._tokens(block), keys, True)
                self._commit(block)

    def _block(self, number: int, frame: int, span: int) -> Block:
        self.plan = None
        return Block(number, "live", frame, span, {FULL: Form(span * self.shape.tokens_per_frame)})

    @staticmethod
    def _tokens(block: Block) -> int:
        return block.forms[FULL].count

    def _keys(self, block: Block, signals: Signals, step: int) -> int:
        before = sum(self._tokens(b) for b in self.live[: self.live.index(block)])
        keys = self._seen(signals) + before + self._tokens(block)
        if isinstance(self.policy, KVRange):
            reach = self.policy.reach(step, self.steps) - 1
            keys = min(keys, self._tokens(block) + reach * self.shape.chunk_tokens)
        return keys

    def _seen(self, signals: Signals) -> int:
        """Tokens of the past in view; a plan is made if the table has changed."""
        if self.plan is None:
            frames = sum(block.span for block in self.blocks)
            plan = self.policy.plan(BlockTable(tuple(self.blocks), tuple(self.live), frames), signals)
            for drop in plan.drops:
                drop_tokens(self.blocks, drop)
            for i, entry in enumerate(plan.entries):
                if isinstance(entry, Fuse):
                    plan = replace(plan, entries=(*plan.entries[:i], self._fused(entry), *plan.entries[i + 1 :]))
            self.plan, self.shown = plan, seen_tokens(self.policy, plan.entries, self.blocks)
            self.held = max(self.held, sum(self._tokens(b) for b in (*self.blocks, *self.live)))
        return self.shown

    def _fused(self, fuse: Fuse) -> Entry:
        old = [block for block in self.blocks if block.id in fuse.blocks]
        spans = sum(block.span for block in old)
        new = replace(old[-1], role="fused", frame=old[0].frame, span=spans, forms={FULL: Form(fuse.n)})
        at = self.blocks.index(old[0])
        self.blocks = [b for b in self.blocks if b.id not in fuse.blocks]
        self.blocks.insert(at, new)
        return Entry(new.id)

    def _scores(self, before: Signals) -> Signals:
        """What a policy that scores would find: as many zeros as there were keys."""
        if self.policy.moment is None or self.plan is None or self.plan.observe == ():
            return before
        wanted = self.plan.observe
        count = sum(self._tokens(b) for b in (*self.blocks, *self.live) if wanted is None or b.id in wanted)
        return Signals(before.chunk, {"cond": {0: torch.zeros(1, 1, count)}})

    def _commit(self, block: Block) -> None:
        self.live.remove(block)
        self.blocks.append(replace(block, role="committed"))
        self.plan = None
