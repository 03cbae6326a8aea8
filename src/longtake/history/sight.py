"""What a chunk was shown of the past: which blocks, in which form, at which place. For whoever looks on: the live page,
comparisons.

A plan may leave choices open to the queries of a chunk's first forward, and the history forgets a plan as soon as the
chunk is committed. So a `Sight` remembers what was in force at the latest pass, and reads it off afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..plan import FULL, Block, Choose, Entry, Plan
from .history import History
from .parts import Chosen


@dataclass(frozen=True)
class Seen:
    """One way in which a block was seen."""

    form: str
    tokens: float  # of a layer that saw it
    at: float  # temporal position of its first frame, in latent frames; a mean where layers chose for themselves
    share: float = 1.0  # of layers × heads that saw it
    log_weight: float = 0.0


@dataclass(frozen=True)
class BlockSight:
    """A block that the history held while a chunk was generated, and how the chunk saw it; () if it did not."""

    block: Block
    seen: tuple[Seen, ...] = ()
    away: frozenset[str] = frozenset()  # forms that lay in host memory

    def tokens(self, form: str) -> float:
        """Tokens of a form that were seen, averaged over the layers."""
        return sum(seen.tokens * seen.share for seen in self.seen if seen.form == form)


@dataclass
class _Pass:
    """What was in force at the latest pass of the stream that is watched."""

    block: int = -1
    plan: Plan = field(default_factory=Plan)
    choices: list[Chosen] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    away: frozenset[tuple[int, str]] = frozenset()


class Sight:
    """Watches the first guidance stream of a history. It takes the place of the history's `probe`."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._last = _Pass()
        history.probe = self._note

    @property
    def own(self) -> int:
        """Id of the block that the latest pass was about; -1 before any."""
        return self._last.block

    @property
    def live(self) -> list[Block]:
        """The chunks that were in flight at the latest pass."""
        return [block for block in self._last.blocks if block.role == "live" or block.id == self.own]

    @property
    def live_shift(self) -> float:
        """By how many latent frames the plan moved the chunks in flight."""
        return float(self._last.plan.live_shift)

    def past(self) -> list[BlockSight]:
        """What the history held at the latest pass besides the chunks in flight, in time order, and what of it was
        seen. Blocks that were being fused are seen as they go into it."""
        live = {block.id for block in self.live}
        seen = self._seen()
        return [
            BlockSight(
                block, tuple(seen.get(block.id, ())),
                frozenset(form for form in block.forms if (block.id, form) in self._last.away),
            )
            for block in self._last.blocks
            if block.id not in live and block.forms
        ]  # fmt: skip

    def _note(self, stream: str, block: int, write: bool, layers: Any) -> None:
        if stream != self._history.streams[0]:
            return
        view = self._history.views[stream]
        if view.plan is None:
            return
        archive = self._history.archives.get(stream)
        away = frozenset(archive.held) if archive is not None else frozenset()
        self._last = _Pass(block, view.plan, view.choices, list(self._history.blocks), away)

    def _seen(self) -> Mapping[int, list[Seen]]:
        blocks = {block.id: block for block in self._last.blocks}
        found: dict[int, list[Seen]] = {}
        choices = iter(self._last.choices)
        # a fusing whose tokens were named at once is done: its block has taken the place of those it was made of
        named = {entry.block for entry in self._last.plan.entries if isinstance(entry, Entry)}
        fused = iter([block for block in self._last.blocks if block.role == "fused" and block.id not in named])
        for entry in self._last.plan.entries:
            if isinstance(entry, Entry):
                block = blocks[entry.block]
                owned = block.forms[entry.form].count
                tokens = owned if entry.tokens is None else len(entry.tokens)
                heads = None if entry.heads is None else entry.heads[self._history.streams[0]]
                share = 1.0 if heads is None else float(heads.float().mean())
                place = block.frame + float(entry.shift)
                found.setdefault(block.id, []).append(Seen(entry.form, tokens, place, share, float(entry.log_weight)))
            elif isinstance(entry, Choose):
                for block_id, one in _chosen(entry, next(choices), blocks):
                    found.setdefault(block_id, []).append(one)
            else:
                # what survives of a fusing is chosen per head: all that goes into it has been looked at
                parts = [blocks[block_id] for block_id in entry.blocks if block_id in blocks]
                for block in parts or [next(fused)]:
                    place = block.frame + float(entry.shift)
                    found.setdefault(block.id, []).append(Seen(FULL, block.forms[FULL].count, place))
        return found


def _chosen(entry: Choose, choice: Chosen, blocks: Mapping[int, Block]) -> list[tuple[int, Seen]]:
    """Every candidate that some layer picked (in some take, of several in lockstep)."""
    found = []
    picks = [row for picked, *_ in choice.picked.values() for row in picked.tolist()]  # [layers × takes][k]
    for number, candidate in enumerate(entry.candidates):
        ranks = [row.index(number) for row in picks if number in row]
        if not ranks:
            continue
        block = blocks[candidate]
        place = float(block.frame) if entry.starts is None else sum(entry.starts[r] for r in ranks) / len(ranks)
        found.append((candidate, Seen(entry.form, block.forms[entry.form].count, place, len(ranks) / len(picks))))
    return found
